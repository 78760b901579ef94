"""Summaries of scores: means with their intervals, of each variant and as differences from the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from personalize_core.errors import InputError, listed
from personalize_core.metrics import pairing, statistics
from personalize_core.metrics.pairing import Difference
from personalize_core.metrics.parquet import write_parquet
from personalize_core.metrics.statistics import DRAWS, Estimate
from personalize_core.metrics.tables import (
    ALL_CONCEPTS,
    ALL_PAIRS,
    BASELINE,
    CEILING,
    COLUMNS,
    EMPTY,
    check_contract,
    checked,
    groups,
    range_of,
    twin_of,
)

WAY = ["base_model", "metric", "encoder"]  # scores that differ in one of these never compare
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
    "low": "lower end of the 95 % interval, cut off at what the score can be; null where nothing was repeated, so that "
    "nothing is known",
    "high": "upper end of the 95 % interval, cut off likewise; null where nothing was repeated",
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
    "pairing": f"how the images were compared with those of {BASELINE!r}: {pairing.MEANING}",
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
                found = _of_real_images(table, labels, cells["concept"].unique(maintain_order=True).to_list())
            else:
                found = estimate_of(cells, "score", draws, seed)
            found = found.within(*range_of(labels["metric"]))
            means = {"mean": found.mean, "micro": micro(cells)}
            rows.append({**labels, "concept": concept, **means, **spread(found), **counts(cells)})
    return summary_of(rows, ["mean", "micro"], ["images", "prompts", "concepts", "n_empty"])


def difference_from_baseline(
    table: pl.DataFrame, baseline: str = BASELINE, draws: int = DRAWS, seed: int = 0
) -> pl.DataFrame:
    """What each variant adds to the baseline, with a 95 % interval, per concept and over all of them.

    Paired, as far as the images are pairs (`pairing`): of those that were sampled here, an image's score less the
    baseline's score on the same concept, prompt and first noise, by the same base model. Averages and intervals are
    those of `summarise`, over the differences; an interval that does not hold 0 shows a difference. Each stands alone:
    `ranking` corrects for looking at many. Variants that share no concept with the baseline have no row.

    Raises:
        InputError: no row has the variant `baseline`.
    """
    check_contract(table := checked(table))
    if table.filter(pl.col("variant") == baseline).is_empty():
        raise InputError(
            f"the baseline {baseline!r} has no scores to compare with; score it, or write another `baseline` into "
            f"params.yaml, of {listed(table.filter(pl.col('prompt_index').is_not_null())['variant'].unique().sort())}"
        )
    # real images have no prompt, so nothing of theirs shares a cell with a sampled image
    rows = over_baseline(with_prompts(table.filter(pl.col("prompt_index").is_not_null())), baseline, draws, seed)
    return summary_of(rows, ["difference"], ["images", "prompts", "concepts", "n_empty", "unpaired"], ["pairing"])


def over_baseline(
    sampled: pl.DataFrame, baseline: str, draws: int, seed: int, differences: int = 0
) -> list[dict[str, Any]]:
    """The rows of `difference_from_baseline`.

    Args:
        sampled: what `with_prompts` returned, of images with prompts.
        differences: how often a difference was taken already: 0 if its scores are those of a table.
    """
    baselines = {
        tuple(way.values()): {concept: own for concept, own in per_concept_and_all(cells)}
        for way, cells in groups(sampled.filter(variant=baseline), WAY)
    }
    rows = []
    for labels, group in groups(sampled.filter(pl.col("variant") != baseline), LABELS):
        beside = baselines.get(tuple(labels[name] for name in WAY), {})
        for concept, cells in per_concept_and_all(group):
            if concept not in beside:
                continue
            images = pairing.images_of(pl.concat([cells, beside[concept]]))
            found = pairing.compare(images[labels["variant"]], images[baseline], draws=draws, seed=seed)
            if found.estimate is None:
                continue
            estimate = found.estimate.within(*range_of(labels["metric"], differences + 1))
            measured = {"difference": estimate.mean, **spread(estimate), "pairing": found.pairing}
            rows.append({**labels, "concept": concept, **measured, **counts_of(found)})
    return rows


def _of_real_images(table: pl.DataFrame, labels: Mapping[str, Any], concepts: Sequence[str]) -> Estimate:
    """One or two concepts' images with each other, or, of a concept with images held out, these with the others."""
    real = table.filter(pl.col("method") == CEILING, pl.col("encoder") == labels["encoder"])
    scores, across = [], []
    for concept in concepts:
        own = real.filter(concept=concept, metric=labels["metric"])
        scores.append(own["score"].to_numpy())
        others = real.filter(concept=concept, metric=twin_of(labels["metric"]))["score"].to_numpy()
        across.append(others if own["pairing"][0] == ALL_PAIRS else None)
    return statistics.of_pairs(scores, across=across)


def with_prompts(table: pl.DataFrame) -> pl.DataFrame:
    """What the statistics need of a table: with numbers for its prompts, equal texts being one prompt and -1 none, and
    with what tells noises apart (`pairing`)."""
    text = pl.coalesce("prompt", pl.col("prompt_index").cast(pl.String))
    number = (text.rank("dense").cast(pl.Int64) - 1).fill_null(-1).alias("prompt_number")
    needed = [*LABELS, "concept", "pairs", "foreground", "score"]
    return table.select(*needed, number, pairing.LINE, pairing.KIND, pairing.NOISE)


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


def counts_of(found: Difference) -> dict[str, int | None]:
    """The same of what a difference is over."""
    masked = found.one.foreground[~np.isnan(found.one.foreground)]
    empty = int((masked < EMPTY).sum()) if len(masked) else None
    counted = {"images": len(found.one), "prompts": found.prompts, "concepts": found.concepts, "n_empty": empty}
    return counted | {"unpaired": found.left_out[0]}


def summary_of(
    rows: list[dict[str, Any]], means: list[str], integers: list[str], words: Sequence[str] = ()
) -> pl.DataFrame:
    labels = ["base_model", "concept", "method", "variant", "metric", "encoder"]
    schema = dict.fromkeys(labels, pl.String()) | {"headline": pl.Boolean()}
    schema |= dict.fromkeys(means, pl.Float64()) | SPREAD | dict.fromkeys(words, pl.String())
    summary = pl.DataFrame(rows, schema=schema | dict.fromkeys(integers, pl.Int64()))
    return summary.sort(pl.col("concept") == ALL_CONCEPTS, "concept", "metric", maintain_order=True)


def write_summary(summary: pl.DataFrame, path: str | Path, more: Mapping[str, str] | None = None) -> None:
    """Write what `summarise` or `difference_from_baseline` returned, with the meaning of its columns.

    more: the meaning of columns that were put beside them.
    """
    meanings = SUMMARY_COLUMNS | dict(more or {})
    write_parquet(summary, path, {name: meanings[name] for name in summary.columns})
