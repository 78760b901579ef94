"""What a method's scores cost, in the same row. What was not recorded is null, never 0.

Parameters and bytes are the artifact's own and stand in the summary. Seconds and memory differ from run to run, while
a comparison is the same bytes every time; they have a table of their own outside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.files.atomic import read_record, read_result, record_of_result
from personalize_core.metrics.parquet import write_parquet
from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.sampling.grid import DESCRIPTION

WEIGHTS, CONFIG = "weights.safetensors", "config.json"

COLUMNS: dict[str, str] = {
    "parameters": "number of trained parameters; over all concepts the mean; null where not recorded, as all costs",
    "artifact_bytes": "size of the artifact's weights file; over all concepts the mean",
}
LABELS = ["method", "concept"]
SCHEMA = pl.Schema(dict.fromkeys(LABELS, pl.String()) | dict.fromkeys(COLUMNS, pl.Float64()))

MEASURED: dict[str, str] = {
    "training_seconds": "time of the training steps, over all sessions of a resumed run; over all concepts the mean",
    "seconds_per_image": "time to sample one image, with test-time optimization if any; over all concepts the mean",
    "training_memory_bytes": "the most memory held at once in training; over all concepts the most",
    "sampling_memory_bytes": "the most memory held at once in sampling; over all concepts the most",
}
WORDS: dict[str, str] = {
    "memory_of": "whose memory that is: tensors on the graphics card, or all that the process held",
    "device": "what it was measured on",
}
ALL_COLUMNS = {
    "method": "how the concept was learned",
    "variant": "the method with its sampling options",
    "concept": f"name of the concept, or {ALL_CONCEPTS!r}",
    **COLUMNS,
    **MEASURED,
    **WORDS,
}


@dataclass(frozen=True)
class Places:
    """Where to look for the costs of one method and concept."""

    method: str
    concept: str
    artifact: Path
    grid: Path
    training: Path  # a file of what was measured
    sampling: Path


def of_artifact(folder: Path) -> dict[str, float | None]:
    """What an artifact tells of its costs."""
    known: dict[str, Any] = dict.fromkeys(COLUMNS)
    if (folder / CONFIG).is_file():
        known["parameters"] = read_result(folder / CONFIG, parameters=(int, float, type(None))).get("parameters")
    if (folder / WEIGHTS).is_file():
        known["artifact_bytes"] = (folder / WEIGHTS).stat().st_size
    return {name: None if value is None else float(value) for name, value in known.items()}


def table(artifacts: Iterable[tuple[str, str, Path]]) -> pl.DataFrame:
    """A row per (method, concept, folder of the artifact)."""
    rows: list[Mapping[str, Any]] = [
        {"method": method, "concept": concept, **of_artifact(folder)} for method, concept, folder in artifacts
    ]
    return pl.DataFrame(rows, schema=SCHEMA)


def beside(summary: pl.DataFrame, costs: pl.DataFrame) -> pl.DataFrame:
    """The rows of a summary with the costs of their method and concept; variants of a method share its costs.

    Args:
        summary: what `summaries.summarise` or `summaries.difference_from_baseline` returned.
        costs: LABELS and COLUMNS, a row per method and concept.
    """
    everywhere = costs.group_by("method").agg(pl.col(name).mean() for name in COLUMNS)
    everywhere = everywhere.select("method", pl.lit(ALL_CONCEPTS).alias("concept"), *COLUMNS)
    joined = pl.concat([costs.select(*LABELS, *COLUMNS), everywhere])
    return summary.join(joined, on=LABELS, how="left", maintain_order="left")


def measured(places: Iterable[Places]) -> pl.DataFrame:
    """All costs: a row per method, variant and concept, then one over all concepts.

    What was measured for an artifact or a grid other than the one that is there now counts as not recorded.
    """
    rows = [row for place in places for row in _rows(place)]
    schema = dict.fromkeys(ALL_COLUMNS, pl.String()) | dict.fromkeys([*COLUMNS, *MEASURED], pl.Float64())
    found = pl.DataFrame(rows, schema=schema)
    means = [*COLUMNS, "training_seconds", "seconds_per_image"]
    everywhere = found.group_by("method", "variant", maintain_order=True).agg(
        pl.lit(ALL_CONCEPTS).alias("concept"),
        *(pl.col(name).mean() if name in means else pl.col(name).max() for name in [*COLUMNS, *MEASURED]),
        *(pl.col(name).drop_nulls().unique().sort().str.join(" and ").replace("", None) for name in WORDS),
    )
    return pl.concat([found, everywhere.select(found.columns)])


def write(places: Iterable[Places], path: Path) -> None:
    write_parquet(measured(places), path, ALL_COLUMNS)


def in_words(row: Mapping[str, Any]) -> str:
    """A row of `measured` for people, as far as it is known."""
    memory = [row[name] for name in ("training_memory_bytes", "sampling_memory_bytes") if row[name] is not None]
    parts = [
        f"{_short(row['parameters']).strip()} trained" if row["parameters"] else "",
        f"{_short(row['artifact_bytes'])}B" if row["parameters"] and row["artifact_bytes"] else "",
        f"{_seconds(row['training_seconds'])} training" if row["training_seconds"] is not None else "",
        f"{_seconds(row['seconds_per_image'])} an image" if row["seconds_per_image"] is not None else "",
        f"{_short(max(memory))}B at most" if memory else "",
    ]
    return ", ".join(part for part in parts if part) or "-"


def _rows(place: Places) -> Iterable[dict[str, Any]]:
    training, sampling = record_of_result(place.training, place.artifact), record_of_result(place.sampling, place.grid)
    known = {
        "method": place.method,
        "concept": place.concept,
        **of_artifact(place.artifact),
        "training_seconds": training.get("training_seconds"),
        "training_memory_bytes": training.get("peak_memory_bytes"),
        "sampling_memory_bytes": sampling.get("peak_memory_bytes"),
    }
    for name in WORDS:
        words = sorted({one[name] for one in (training, sampling) if name in one})
        known[name] = " and ".join(words) or None
    for variant in read_record(place.grid / DESCRIPTION).get("variants", ()):
        yield {**known, "variant": variant, "seconds_per_image": sampling.get("seconds_per_image", {}).get(variant)}


def _short(number: float) -> str:
    for size, word in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:.0f} "


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
