"""What a step did, as Dagster's UI shows it best: numbers, images in the page, a table.

Measured on Dagster 1.13: a Markdown value under 1,000 characters is rendered in place, a longer one behind a link;
images must be data URIs, for the web server serves no files. Every payload is stored three times, so images are
kept small.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from pipelines.presentation import history

if TYPE_CHECKING:
    from personalize_core.steps import Report
    from personalize_core.workspace.store import Store

Metadata = dict[str, dg.MetadataValue]

THUMBNAIL = 700  # bytes of an image that stands in the page
BEHIND_LINK = 60_000  # bytes of one that opens on a click
WIDEST = 1150  # pixels of it: what the page shows without scrolling
MOST_GRIDS = 8  # on a comparison; the others lie at its path


def result(
    context: dg.AssetExecutionContext, store: Store, report: Report, more: Mapping[str, dg.MetadataValue] | None = None
) -> dg.MaterializeResult:
    """The materialization, what there is to see first.

    Its data version is the step's stamp, which names everything the result depends on.
    """
    about = of(store, report, more, _shown_last(context, report))
    return dg.MaterializeResult(metadata=about, data_version=dg.DataVersion(str(report.stamp)))


def of(
    store: Store,
    report: Report,
    more: Mapping[str, dg.MetadataValue] | None = None,
    before: dg.EventLogRecord | None = None,
) -> Metadata:
    """Images first, then what else is told, then numbers.

    Args:
        before: an event that showed the same result; images that have not changed since are taken from it.
    """
    metadata: Metadata = {}
    served = store.params.automation.base_url if report.images else None
    for name, path in report.images.items():
        if served:
            address = f"{served.rstrip('/')}/{urllib.parse.quote(_below(store, path))}?{report.stamp}"
            metadata |= linked(name, path, address, before)
        else:
            metadata |= (before and shown_before(before, name, path)) or image(name, path)
    metadata |= more or {}
    metadata |= {name: dg.MetadataValue.float(value) for name, value in report.metrics.items()}
    metadata |= {
        "path": dg.MetadataValue.path(str(report.path)),
        "seconds": dg.MetadataValue.float(round(report.seconds, 2)),
        "skipped": dg.MetadataValue.bool(report.skipped),
    }
    return metadata


def overview(
    context: dg.AssetExecutionContext, store: Store, report: Report, more: Mapping[str, dg.MetadataValue] | None = None
) -> dg.MaterializeResult:
    """A comparison: the plot over all concepts, then the grids of the first few."""
    return result(context, store, of_overview(report), more)


def of_overview(report: Report) -> Report:
    """The same with the images that fit into a page."""
    grids = [name for name in report.images if name.startswith("grid")][:MOST_GRIDS]
    shown = [name for name in ("identity_vs_text", *grids) if name in report.images]
    return dataclasses.replace(report, images={name: report.images[name] for name in shown})


def linked(name: str, path: Path, address: str, before: dg.EventLogRecord | None) -> Metadata:
    """A thumbnail in the page, which would show a linked image in its full width, and a link to the image.

    Args:
        address: with the stamp in it, so that a browser shows no older image.
    """
    known = shown_before(before, name, path) if before else {}
    preview = f"{name}_preview"
    return {preview: known.get(preview) or _thumbnail(name, path), name: dg.MetadataValue.url(address)}


def _below(store: Store, path: Path) -> str:
    """Where an image lies in data/, which is what is served."""
    return path.relative_to(store.data).as_posix()


def _shown_last(context: dg.AssetExecutionContext, report: Report) -> dg.EventLogRecord | None:
    """The last materialization, if it shows images of the very result that a step found current."""
    if not report.images or not report.skipped:
        return None
    record = history.last(
        context.instance, context.asset_key, context.partition_key if context.has_partition_key else None
    )
    return record if history.data_version(record) == str(report.stamp) else None


def shown_before(record: dg.EventLogRecord, name: str, path: Path) -> Metadata:
    """The image as that event shows it, for shrinking takes its time; empty if the file has changed since."""
    shown = record.asset_materialization.metadata if record.asset_materialization else {}
    keys = (f"{name}_preview", name)
    if not shown.keys() >= {*keys} or path.stat().st_ctime >= record.timestamp:
        return {}
    return {key: shown[key] for key in keys}


def image(name: str, path: Path) -> Metadata:
    """A thumbnail in the page, and the image itself behind a link."""
    return {f"{name}_preview": _thumbnail(name, path), name: _image(name, "webp", _webp(path, BEHIND_LINK))}


def loss_curve(report: Report) -> Metadata:
    """The diffusion loss over training: a line in the page, in place of its image's thumbnail, and numbers."""
    from personalize_core.report.figures.sparkline import loss_sparkline_svg
    from personalize_core.training import training_log

    losses = [row["diffusion"] for row in training_log.read(report.path)]
    if not losses:
        return {}
    tenth = max(1, len(losses) // 10)
    line = urllib.parse.quote(loss_sparkline_svg(losses), safe="='/:,.")
    return {
        "loss_preview": dg.MetadataValue.md(f"![loss](data:image/svg+xml,{line})"),
        "loss_first_tenth": dg.MetadataValue.float(sum(losses[:tenth]) / tenth),
        "loss_last_tenth": dg.MetadataValue.float(sum(losses[-tenth:]) / tenth),
        "training_steps": dg.MetadataValue.int(len(losses)),
    }


def scores_by_prompt(report: Report) -> Metadata:
    """A row for each variant and prompt, a column for each metric."""
    import polars as pl

    from personalize_core.metrics import tables

    scores = tables.read(report.path).filter("headline")
    means = (
        scores.pivot("metric", index=["variant", "prompt"], values="score", aggregate_function="mean")
        .sort("variant", "prompt")
        .with_columns(pl.selectors.float().round(4))
    )
    names = [name for name in means.columns if name not in ("variant", "prompt")]
    columns = [dg.TableColumn("variant"), dg.TableColumn("prompt"), *(dg.TableColumn(n, "float") for n in names)]
    records = [dg.TableRecord(row) for row in means.iter_rows(named=True)]
    return {
        "by_prompt": dg.MetadataValue.table(records, schema=dg.TableSchema(columns)),
        "dagster/row_count": dg.MetadataValue.int(len(scores)),
    }


def _thumbnail(name: str, path: Path) -> dg.MetadataValue:
    from personalize_core.report.figures.images import thumbnail_webp

    return _image(name, "webp", thumbnail_webp(path, THUMBNAIL))


def _image(name: str, kind: str, content: bytes) -> dg.MetadataValue:
    return dg.MetadataValue.md(f"![{name}](data:image/{kind};base64,{base64.b64encode(content).decode()})")


def _webp(path: Path, most: int) -> bytes:
    """The image in at most so many bytes: as large as fits at a good quality."""
    from PIL import ImageOps

    from personalize_core.report.figures.images import opened_figure

    whole = opened_figure(path)
    content = b""
    for width in (WIDEST, 850, 650, 500, 380, 290, 220):
        smaller = ImageOps.contain(whole, (min(width, whole.width), 2 * width))
        for quality in (85, 70, 50):
            encoded = io.BytesIO()
            smaller.save(encoded, "WEBP", quality=quality)
            content = encoded.getvalue()
            if len(content) <= most:
                return content
    return content
