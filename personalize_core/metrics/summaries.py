"""Summaries of scores: means with their intervals, of each variant and as differences from the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from personalize_core.errors import InputError, listed
from personalize_core.metrics import statistics
from personalize_core.metrics.parquet import write_parquet
from personalize_core.metrics.statistics import DRAWS, Estimate
from personalize_core.metrics.tables import (
    ALL_CONCEPTS,
    BASELINE,
    CEILING,
    CELL,
    COLUMNS,
    EMPTY,
    check_contract,
    checked,
    groups,
)

LABELS = ["base_model", "method", "variant", "metric", "encoder", "headline"]  # what a summary tells apart

SUMMARY_COLUMNS: dict[str, str] = {
    "base_model": COLUMNS["base_model"].meaning,
    "concept": f"name of the concept, or {ALL_CONCEPTS!r}: the macro average over them",
    "method": COLUMNS["method"].meaning,
    "variant": COLUMNS["variant"].meaning,
    "metric": COLUMNS["metric"].meaning,
    "encoder": COLUMNS["encoder"].meaning,
    "headline": COLUMNS["headline"].meaning,
    "mean": "macro average: mean over a prompt's images, then over prompts, then over concepts",
    "micro": "micro average: mean over all cosines of all images, of whatever prompt and concept",
    "difference": f"the same mean, of the variant's score less the score of {BASELINE!r} on the same cell and prompt",
    "low": "lower end of the 95 % interval; null where nothing was repeated, so that nothing is known",
    "high": "upper end of the 95 % interval; null where nothing was repeated",
    "error": "standard error of the mean; null where nothing was repeated",
    "freedom": "degrees of freedom of the standard error: with few, the interval is many standard errors wide",
    "over": (
        "what the interval lets vary; what is not named is held fixed: 'prompts' is about these concepts alone (one "
        "or two), 'images' about these concepts in one prompt; null where nothing was repeated"
    ),
    "images": "how many images the mean is over",
    "n_empty": "how many of them do not show the concept: their mask is empty; null for metrics without masks",
    "prompts": "how many different prompts; 0 for real images",
    "concepts": "how many concepts",
    "unpaired": f"images left out because {BASELINE!r} has none on the same cell and prompt",
}

SPREAD: dict[str, pl.DataType] = {  # what a summary says of an Estimate, besides its mean
    "low": pl.Float64(),
    "high": pl.Float64(),
    "error": pl.Float64(),
    "freedom": pl.Float64(),
    "over": pl.String(),
}


def summarise(table: pl.DataFrame, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """Mean and 95 % interval of each variant and metric, per concept and over all of them.

    Means are macro averages: over a prompt's images, then over prompts, then over concepts. Intervals are those of
    `statistics.estimate`. Over three concepts or more they tell how other concepts and other prompts of the kind would
    come out; for one or two, how other prompts would, of these. A prompt is its text, wherever it stands in its list.
    Concept images of one or two concepts, compared with each other, have the interval of `statistics.of_pairs`.

    Returns:
        the columns base_model, concept, method, variant, metric, encoder, headline, mean, micro, low, high, error,
        freedom, over, images, prompts, concepts, n_empty; the last rows are those of ALL_CONCEPTS.
    """
    check_contract(table := checked(table))
    rows = []
    for labels, group in groups(with_prompts(table), LABELS):
        for concept, cells in per_concept_and_all(group):
            if labels["method"] == CEILING and cells["concept"].n_unique() < statistics.FEWEST_CONCEPTS:
                found = statistics.of_pairs([own["score"].to_numpy() for _, own in groups(cells, ["concept"])])
            else:
                found = estimate_of(cells, "score", draws, seed)
            means = {"mean": found.mean, "micro": micro(cells)}
            rows.append({**labels, "concept": concept, **means, **spread(found), **counts(cells)})
    return summary_of(rows, ["mean", "micro"], ["images", "prompts", "concepts", "n_empty"])


def difference_from_baseline(
    table: pl.DataFrame, baseline: str = BASELINE, draws: int = DRAWS, seed: int = 0
) -> pl.DataFrame:
    """What each variant adds to the baseline, with a 95 % interval, per concept and over all of them.

    Paired: an image's score less the baseline's score on the same cell (concept, prompt_index, image_index) and base
    model, which shares prompt and first noise. Averages and intervals are those of `summarise`, over the
    differences; an interval that does not hold 0 shows a difference. Each stands alone: `ranking` corrects for
    looking at many. Variants without any pair have no row.

    Raises:
        InputError: no row has the variant `baseline`.
    """
    check_contract(table := checked(table))
    is_baseline = pl.col("variant") == baseline
    if table.filter(is_baseline).is_empty():
        raise InputError(
            f"the table has no variant {baseline!r} to compare with; its variants are "
            f"{listed(table['variant'].unique().sort())}"
        )
    # images of two prompts are no pair, whatever their place in their lists
    on = ["base_model", "metric", "encoder", *CELL, "prompt_number"]
    # real images have no prompt, so nothing of theirs shares a cell with a sampled image
    sampled = with_prompts(table.filter(pl.col("prompt_index").is_not_null()), "image_index")
    baselines = sampled.filter(is_baseline).select(*on, pl.col("score").alias("baseline_score"))
    others = sampled.filter(~is_baseline).join(baselines, on=on, how="left", nulls_equal=True, maintain_order="left")
    others = others.with_columns(difference=pl.col("score") - pl.col("baseline_score"))
    rows = []
    for labels, group in groups(others, LABELS):
        for concept, cells in per_concept_and_all(group):
            pairs = cells.drop_nulls("difference")
            if pairs.is_empty():
                continue
            found = estimate_of(pairs, "difference", draws, seed)
            measured = {"difference": found.mean, **spread(found), "unpaired": len(cells) - len(pairs)}
            rows.append({**labels, "concept": concept, **measured, **counts(pairs)})
    return summary_of(rows, ["difference"], ["images", "prompts", "concepts", "n_empty", "unpaired"])


def with_prompts(table: pl.DataFrame, *also: str) -> pl.DataFrame:
    """What the statistics need of a table, with numbers for its prompts: equal texts are one prompt, -1 is none."""
    text = pl.coalesce("prompt", pl.col("prompt_index").cast(pl.String))
    number = (text.rank("dense").cast(pl.Int64) - 1).fill_null(-1).alias("prompt_number")
    needed = [*LABELS, "concept", "prompt_index", *also, "pairs", "foreground", "score"]
    return table.select(*needed, number)


def estimate_of(cells: pl.DataFrame, column: str, draws: int, seed: int) -> Estimate:
    concepts = cells["concept"].rank("dense").to_numpy()
    values = cells[column].to_numpy()
    return statistics.estimate(concepts, cells["prompt_number"].to_numpy(), values, draws=draws, seed=seed)


def spread(found: Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SPREAD}


def per_concept_and_all(group: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for labels, cells in groups(group, ["concept"]):
        yield labels["concept"], cells
    yield ALL_CONCEPTS, group


def micro(cells: pl.DataFrame) -> float:
    """The mean over all cosines, as OFT's script takes it: each image weighs as many as it was compared with."""
    return float(np.average(cells["score"].to_numpy(), weights=cells["pairs"].to_numpy()))


def counts(cells: pl.DataFrame) -> dict[str, int | None]:
    prompts = cells.filter(pl.col("prompt_number") >= 0)["prompt_number"].n_unique()
    masked = cells["foreground"].drop_nulls()
    empty = int((masked < EMPTY).sum()) if len(masked) else None
    return {"images": len(cells), "prompts": prompts, "concepts": cells["concept"].n_unique(), "n_empty": empty}


def summary_of(rows: list[dict[str, Any]], means: list[str], integers: list[str]) -> pl.DataFrame:
    labels = ["base_model", "concept", "method", "variant", "metric", "encoder"]
    schema = dict.fromkeys(labels, pl.String()) | {"headline": pl.Boolean()}
    schema |= dict.fromkeys(means, pl.Float64()) | SPREAD
    summary = pl.DataFrame(rows, schema=schema | dict.fromkeys(integers, pl.Int64()))
    return summary.sort(pl.col("concept") == ALL_CONCEPTS, "concept", "metric", maintain_order=True)


def write_summary(summary: pl.DataFrame, path: str | Path, more: Mapping[str, str] | None = None) -> None:
    """Write what `summarise` or `difference_from_baseline` returned, with the meaning of its columns.

    more: the meaning of columns that were put beside them.
    """
    meanings = SUMMARY_COLUMNS | dict(more or {})
    write_parquet(summary, path, {name: meanings[name] for name in summary.columns})
