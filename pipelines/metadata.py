"""What a step did, as Dagster's UI shows it best: numbers, pictures in the page, a table.

Measured on Dagster 1.13: a Markdown value under 1,000 characters is rendered in place, a longer one behind a link;
pictures must be data URIs, for the web server serves no files. Every payload is stored three times, so pictures are
kept small.
"""

from __future__ import annotations

import base64
import io
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from PIL import Image

    from personalize_core.steps import Report

Metadata = dict[str, dg.MetadataValue]

IN_PLACE = 999  # characters
BEHIND_LINK = 60_000  # bytes of a picture that opens on a click
POINTS = 40  # of a loss curve
SAFE = "='/:,."  # what may stand unescaped in a data URI inside Markdown


def result(report: Report, more: Metadata | None = None) -> dg.MaterializeResult:
    """The materialization: its data version is the step's stamp, which names everything the result depends on."""
    metadata: Metadata = {
        "path": dg.MetadataValue.path(str(report.path)),
        "skipped": dg.MetadataValue.bool(report.skipped),
        "seconds": dg.MetadataValue.float(round(report.seconds, 2)),
    }
    metadata |= {name: dg.MetadataValue.float(value) for name, value in report.numbers.items()}
    for name, path in report.pictures.items():
        metadata |= picture(name, path)
    return dg.MaterializeResult(metadata=metadata | (more or {}), data_version=dg.DataVersion(report.stamp))


def picture(name: str, path: Path) -> Metadata:
    """A thumbnail in the page, and the picture itself behind a link."""
    from PIL import Image

    with Image.open(path) as opened:
        shown = opened.convert("RGB")
    in_place = (IN_PLACE - len(_markdown(name, "image/webp", b""))) * 3 // 4  # base64 makes four of three
    return {
        f"{name}_preview": dg.MetadataValue.md(_markdown(name, "image/webp", _webp(shown, in_place))),
        name: dg.MetadataValue.md(_markdown(name, "image/webp", _webp(shown, BEHIND_LINK))),
    }


def loss_curve(report: Report) -> Metadata:
    """The diffusion loss over training as a line in the page, with its mean at the start and at the end."""
    from personalize_core import training_log

    losses = [row["diffusion"] for row in training_log.read(report.path)]
    if not losses:
        return {}
    means = _means(losses, POINTS)
    return {
        "loss_curve": dg.MetadataValue.md(f"![loss](data:image/svg+xml,{urllib.parse.quote(_line(means), safe=SAFE)})"),
        "loss_first_tenth": dg.MetadataValue.float(_means(losses, 10)[0]),
        "loss_last_tenth": dg.MetadataValue.float(_means(losses, 10)[-1]),
        "steps": dg.MetadataValue.int(len(losses)),
    }


def scores_by_prompt(report: Report) -> Metadata:
    """A row for each variant and prompt, a column for each metric."""
    import polars as pl

    from personalize_core.metrics import tables

    scores = tables.read(report.path)
    means = scores.pivot("metric", index=["variant", "prompt"], values="score", aggregate_function="mean")
    names = [name for name in means.columns if name not in ("variant", "prompt")]
    records = [
        dg.TableRecord({**row, **{name: round(row[name], 4) for name in names if row[name] is not None}})
        for row in means.sort("variant", "prompt", nulls_last=True)
        .with_columns(pl.col("prompt").fill_null(""))
        .to_dicts()
    ]
    columns = [dg.TableColumn("variant"), dg.TableColumn("prompt"), *(dg.TableColumn(n, "float") for n in names)]
    return {
        "by_prompt": dg.MetadataValue.table(records, schema=dg.TableSchema(columns)),
        "dagster/row_count": dg.MetadataValue.int(len(scores)),
    }


def _markdown(name: str, kind: str, content: bytes) -> str:
    return f"![{name}](data:{kind};base64,{base64.b64encode(content).decode()})"


def _webp(picture: Image.Image, most: int) -> bytes:
    """The picture in at most so many bytes: as large as fits, then as fine as fits."""
    longer = max(picture.size)
    content = b""
    for width in [size for size in (1600, 1200, 900, 600, 400, 256, 128, 96, 80, 64, 48, 32, 16) if size < 2 * longer]:
        scaled = picture.copy()
        scaled.thumbnail((width, width))
        for quality in (90, 75, 60, 40, 20, 5):
            encoded = io.BytesIO()
            scaled.save(encoded, "webp", quality=quality, method=6)
            content = encoded.getvalue()
            if len(content) <= most:
                return content
    return content


def _means(values: list[float], parts: int) -> list[float]:
    """Means of that many stretches of equal length (of single values, if there are fewer)."""
    parts = min(parts, len(values))
    edges = [round(part * len(values) / parts) for part in range(parts + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _line(values: list[float]) -> str:
    """An SVG of 160 x 40 pixels: time to the right, loss upwards."""
    low, high = min(values), max(values)
    points = " ".join(
        f"{160 * index / max(len(values) - 1, 1):.0f},{38 - 36 * (value - low) / (high - low or 1):.0f}"
        for index, value in enumerate(values)
    )
    return (
        "<svg xmlns='http://www.w3.org/2000/svg' width='160' height='40'>"
        f"<polyline points='{points}' fill='none' stroke='#36c'/></svg>"
    )
