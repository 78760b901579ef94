"""What a method's scores cost, beside them in the same row. What was not recorded is null, never 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.files import read_json
from personalize_core.metrics.tables import ALL_CONCEPTS

WEIGHTS, CONFIG, MEASURED = "weights.safetensors", "config.json", "costs.json"

COLUMNS: dict[str, str] = {
    "parameters": "how many numbers were trained; over all concepts the mean; null where not recorded, as all costs",
    "artifact_bytes": "size of the artifact's weights file; over all concepts the mean",
    "training_seconds": "time of the training steps; over all concepts the mean",
    "seconds_per_image": "time to draw one picture; over all concepts the mean",
    "peak_memory_bytes": "most memory that the device held at once; over all concepts the most",
}
LABELS = ["method", "concept"]
SCHEMA = pl.Schema(dict.fromkeys(LABELS, pl.String()) | dict.fromkeys(COLUMNS, pl.Float64()))


def of_artifact(folder: Path) -> dict[str, float | None]:
    """What an artifact tells of its costs; what stands in its costs.json, if there is one, is taken as it is."""
    known: dict[str, Any] = dict.fromkeys(COLUMNS)
    if (folder / CONFIG).is_file():
        known["parameters"] = read_json(folder / CONFIG).get("parameters")
    if (folder / WEIGHTS).is_file():
        known["artifact_bytes"] = (folder / WEIGHTS).stat().st_size
    if (folder / MEASURED).is_file():
        known |= {name: value for name, value in read_json(folder / MEASURED).items() if name in COLUMNS}
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
        summary: what `tables.summarise` or `tables.difference_from_floor` returned.
        costs: LABELS and COLUMNS, a row per method and concept.
    """
    most = pl.col("peak_memory_bytes").max()
    everywhere = costs.group_by("method").agg(*(pl.col(name).mean() for name in list(COLUMNS)[:-1]), most)
    everywhere = everywhere.select("method", pl.lit(ALL_CONCEPTS).alias("concept"), *COLUMNS)
    joined = pl.concat([costs.select(*LABELS, *COLUMNS), everywhere])
    return summary.join(joined, on=LABELS, how="left", maintain_order="left")
