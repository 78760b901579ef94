"""Verdicts: which variant is better by a metric, and where the scores leave it undecided.

Any two variants are compared on the cells that both have (concept, prompt_index, image_index: the same prompt and the
same first noise; images made elsewhere as `pairing` says), and all pairs of a table at once. Whoever looks at the 45
pairs of ten variants one by one will find a difference in every second table that has none; so the intervals are
simultaneous: with 95 % probability, all hold.

Each pair's interval stands at the level of Tukey's studentized range (Tukey 1953; Kramer 1956), with the pair's own
standard error and degrees of freedom. Why not Holm or Bonferroni on the pairs' p-values: they know nothing of what the
pairs have in common, and ten variants have 45 pairs but nine independent differences. What the variants share in a cell
cancels in the differences; what is left is the case that Tukey's level is exact for, and for unequal correlations it
errs on the safe side. Why not the bootstrap's own maximum: at eight concepts and five prompts it would have to find the
1 in 600 tail of a handful of values. An interval also says how large a difference may be, which a p-value does not.
`benchmarks/coverage.py` measures how often all intervals of a table hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from personalize_core.errors import InputError
from personalize_core.metrics import pairing, parquet, statistics, summaries, tables
from personalize_core.metrics.pairing import Images
from personalize_core.metrics.statistics import DRAWS, LEVEL, Noise
from personalize_core.metrics.tables import ALL_CONCEPTS, BASELINE, CEILING, CELL

HIGHER, LOWER, UNDECIDED = "higher", "lower", "undecided"

PAIR_COLUMNS: dict[str, str] = {
    "base_model": tables.COLUMNS["base_model"].meaning,
    "metric": tables.COLUMNS["metric"].meaning,
    "encoder": tables.COLUMNS["encoder"].meaning,
    "variant": "one of the two",
    "other": "the other; the base model alone (the baseline) is one of them, real images are not",
    "verdict": f"{HIGHER!r} or {LOWER!r} where the interval does not hold 0, else {UNDECIDED!r}",
    "pairing": pairing.MEANING,
    "difference": "mean score of the variant less the other's on the same cells; null where they share none",
    "low": "lower end, cut off at what a difference can be; all intervals of this base model and metric hold together "
    "in 95 % of tables",
    "high": "upper end, cut off likewise",
    "error": summaries.SUMMARY_COLUMNS["error"],
    "freedom": summaries.SUMMARY_COLUMNS["freedom"],
    "over": summaries.SUMMARY_COLUMNS["over"],
    "training_noise": "standard deviation that training again adds to the difference, in error; null: not measured",
    "level": "how often this interval alone may miss, so that together they hold",
    "comparisons": "how many pairs of this base model and metric were compared",
    "images": "how many pairs of images; where images are no pairs, those of the variant with fewer",
    "prompts": "how many different prompts",
    "concepts": "how many concepts",
    "unpaired": "images of either that the other has none for",
}

RANK_COLUMNS: dict[str, str] = {
    "base_model": tables.COLUMNS["base_model"].meaning,
    "metric": tables.COLUMNS["metric"].meaning,
    "encoder": tables.COLUMNS["encoder"].meaning,
    "method": tables.COLUMNS["method"].meaning,
    "variant": tables.COLUMNS["variant"].meaning,
    "mean": "mean over all its images: over a prompt's images, then over prompts, then over concepts",
    "concepts": "over how many; where variants differ in it, the means do not compare, and the places do",
    "place_from": "its best possible place, 1 plus the variants that are above it by a verdict; all places hold "
    "together in 95 % of tables",
    "place_to": "its worst possible place, the number of variants less those that are below it by a verdict",
    "above": "the variants that it is above by a verdict, separated by ', '",
    "cannot_tell_from": "the variants that it cannot be told apart from, separated by ', '",
}

NOISE_COLUMNS: dict[str, str] = {
    "base_model": tables.COLUMNS["base_model"].meaning,
    "concept": summaries.SUMMARY_COLUMNS["concept"],
    "method": tables.COLUMNS["method"].meaning,
    "variant": tables.COLUMNS["variant"].meaning,
    "metric": tables.COLUMNS["metric"].meaning,
    "encoder": tables.COLUMNS["encoder"].meaning,
    "trainings": "how many times it was trained, each with a seed of its own, and sampled on the same cells",
    "concepts": "how many concepts that was done for; it may be fewer than are compared",
    "mean": "mean over these trainings",
    "between": "standard deviation of the mean between trainings: the training noise",
    "least": "the least difference of two single trainings that is beyond their noise (95 %): t sqrt(2) between",
    "beyond": (
        "the part of it that the interval does not hold already: all of it for one or two concepts; an interval over "
        "concepts lacks what a seed does to all of them alike"
    ),
}


def pairs(
    table: pl.DataFrame, noise: pl.DataFrame | None = None, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> pl.DataFrame:
    """A row for every two variants of a base model and metric, over all concepts, with a verdict.

    Of several encoders only the headline's scores are looked at.

    Args:
        noise: what `training_noise` returned. What training again adds to a difference goes into its standard error.
            Without it (and for variants that it does not know, but the baseline, which trains nothing) a verdict about
            one or two concepts is about these very trainings. An interval over concepts holds that much of the noise
            by itself, for every concept was trained anew.
        level: how often any interval of a base model and metric may miss.
    """
    tables.check_contract(table := tables.checked(table))
    sampled = table.filter(pl.col("headline") & (pl.col("method") != CEILING) & pl.col("prompt_index").is_not_null())
    measured = {} if noise is None else _noise_of(noise)
    rows = []
    for labels, group in tables.groups(summaries.with_prompts(sampled), summaries.WAY):
        images = pairing.images_of(group)
        if len(images) < 2:
            continue
        concepts, alone = group["concept"].unique().sort().to_list(), level_of_one(level, len(images))
        for one, other in itertools.combinations(sorted(images), 2):
            added = partial(_added, measured, labels, [one, other], concepts)
            found = pairing.compare(
                images[one], images[other], draws=draws, seed=seed, level=alone, cautious=True, noise=added
            )
            row: dict[str, Any] = {
                **labels, "variant": one, "other": other, "pairing": found.pairing, "level": alone,
                "comparisons": len(images) * (len(images) - 1) // 2, "images": found.images,
                "unpaired": sum(found.left_out), "prompts": found.prompts, "concepts": found.concepts,
            }  # fmt: skip
            if found.estimate:
                estimate = found.estimate.within(*tables.range_of(labels["metric"], differences=1))
                row |= {"difference": estimate.mean, **summaries.spread(estimate)}
                row["training_noise"] = None if (extra := added(found.one)) is None else float(np.sqrt(extra.variance))
            rows.append({**row, "verdict": verdict(row.get("low"), row.get("high"))})
    schema = {name: pl.Float64() for name in PAIR_COLUMNS} | dict.fromkeys(
        [*summaries.WAY, "variant", "other", "verdict", "over", "pairing"], pl.String()
    )
    schema |= dict.fromkeys(["comparisons", "images", "prompts", "concepts", "unpaired"], pl.Int64())
    return pl.DataFrame(rows, schema=schema)


def verdict(low: float | None, high: float | None) -> str:
    if low is not None and low > 0:
        return HIGHER
    return LOWER if high is not None and high < 0 else UNDECIDED


def level_of_one(level: float, variants: int) -> float:
    """The level at which each of all pairs of `variants` stands so that together they stand at `level`.

    That of Tukey's studentized range q for known variances, 2 Phi(-q / sqrt(2)); each pair then has a t of its own
    degrees of freedom at this level. (Tukey's q for few degrees of freedom supposes one pooled standard error, which
    methods that differ in kind do not have.)
    """
    from scipy.special import ndtr
    from scipy.stats import studentized_range  # takes a second to import

    return level if variants == 2 else float(2 * ndtr(-studentized_range.ppf(1 - level, variants, np.inf) / np.sqrt(2)))


def rank(compared: pl.DataFrame, summary: pl.DataFrame) -> pl.DataFrame:
    """A row for each variant of a base model and metric, best mean first, with the places that it may have.

    Places that follow from simultaneous intervals of all differences hold together just as these do (Klein, Wright
    and Wieczorek 2020, "A joint confidence region for an overall ranking of populations").

    Args:
        compared: what `pairs` returned.
        summary: what `summaries.summarise` returned for the same table.
    """
    above: dict[tuple, list[str]] = {}
    unclear: dict[tuple, list[str]] = {}
    below: dict[tuple, list[str]] = {}
    for row in compared.iter_rows(named=True):
        where = (row["base_model"], row["metric"])
        for variant, other, won in (
            (row["variant"], row["other"], HIGHER),
            (row["other"], row["variant"], LOWER),
        ):
            found = {won: above, UNDECIDED: unclear}.get(row["verdict"], below)
            found.setdefault((*where, variant), []).append(other)
    rows = []
    ranked_rows = pl.col("headline") & (pl.col("concept") == ALL_CONCEPTS) & (pl.col("method") != CEILING)
    for row in summary.filter(ranked_rows).iter_rows(named=True):
        key = (row["base_model"], row["metric"], row["variant"])
        over, unsure, under = (sorted(found.get(key, [])) for found in (above, unclear, below))
        rows.append(
            {name: row[name] for name in ("base_model", "metric", "encoder", "method", "variant", "mean", "concepts")}
            | {"place_from": 1 + len(under), "place_to": 1 + len(under) + len(unsure)}
            | {"above": ", ".join(over), "cannot_tell_from": ", ".join(unsure)}
        )
    schema = dict.fromkeys(RANK_COLUMNS, pl.String()) | {
        "mean": pl.Float64(), "concepts": pl.Int64(), "place_from": pl.Int64(), "place_to": pl.Int64(),
    }  # fmt: skip
    ranked = pl.DataFrame(rows, schema=schema)
    return ranked.sort(
        ["base_model", "metric", "place_from", "place_to", "mean", "variant"],
        descending=[False, False, False, False, True, False],
    )


def training_noise(trainings: Mapping[int, pl.DataFrame]) -> pl.DataFrame:
    """How much a method's means vary between trainings that differ in their seed alone.

    Args:
        trainings: training seed -> table of scores. Images must be sampled from the same noise in all of them. Cells
            that not every table has are left out.

    Returns:
        a row per variant and metric and concept, then over all concepts. The baseline and real images, which nothing is
        trained for, have no row.

    Raises:
        InputError: there are fewer than two trainings, or some table lacks a variant altogether.
    """
    from scipy import special  # here, so that a comparison is shown without it

    if len(trainings) < 2:
        raise InputError("the noise of training shows between two trainings at least; train with another seed too")
    by = ["base_model", "method", "variant", "metric", "encoder"]
    numbered = [tables.checked(table).with_columns(training=pl.lit(key)) for key, table in sorted(trainings.items())]
    tables.check_contract(together := pl.concat(numbered))
    sampled = (pl.col("method") != CEILING) & pl.col("prompt_index").is_not_null()
    together = together.filter(pl.col("headline") & (pl.col("variant") != BASELINE) & sampled)
    rows = []
    for labels, group in tables.groups(together.sort([*by, "training", *CELL]), by):
        if lacking := sorted(set(trainings) - set(group["training"])):
            raise InputError(f"the training with seed {lacking[0]} has no {labels['metric']} of {labels['variant']}")
        everywhere = group.filter(pl.col("training").n_unique().over(CELL) == len(trainings))
        if everywhere.is_empty():
            raise InputError(f"no image of {labels['variant']} has been sampled from all its trainings")
        text = pl.coalesce("prompt", pl.col("prompt_index").cast(pl.String)).alias("text_of")
        prompts = everywhere.group_by("training", "concept", text).agg(pl.col("score").mean())
        means = prompts.group_by("training", "concept").agg(pl.col("score").mean()).sort("concept", "training")
        concepts = means["concept"].unique().sort().to_list()
        grid = means["score"].to_numpy().reshape(len(concepts), len(trainings))
        for name, values in [*zip(concepts, grid, strict=True), (ALL_CONCEPTS, grid.mean(axis=0))]:
            between = float(values.std(ddof=1))
            beyond = beyond_the_interval(grid) if name == ALL_CONCEPTS else between
            t = float(special.stdtrit(len(trainings) - 1, 1 - LEVEL / 2))
            rows.append(
                {**labels, "concept": name, "trainings": len(trainings), "mean": float(values.mean())}
                | {"between": between, "least": t * 2**0.5 * between, "beyond": beyond}
                | {"concepts": len(concepts) if name == ALL_CONCEPTS else 1}
            )
    schema = dict.fromkeys(NOISE_COLUMNS, pl.Float64()) | dict.fromkeys(["concept", *by], pl.String())
    found = pl.DataFrame(rows, schema=schema | {"trainings": pl.Int64(), "concepts": pl.Int64()})
    return found.sort(pl.col("concept") == ALL_CONCEPTS, "concept", "metric", "variant", maintain_order=True)


def beyond_the_interval(means: np.ndarray) -> float:
    """Standard deviation of what a training seed does to all concepts alike, which no spread between them shows.

    means: (concepts, trainings). Every concept is trained by itself; were that all, the mean over c concepts would
    vary between seeds by the residual variance over c. What it varies more is shared (two-way table, one value per
    cell; never below 0). Of one or two concepts, which no interval is over, everything counts.
    """
    c, r = means.shape
    of_seeds = float(means.mean(axis=0).var(ddof=1))
    if c < statistics.FEWEST_CONCEPTS:
        return of_seeds**0.5
    residuals = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
    return max(of_seeds - float((residuals**2).sum()) / ((c - 1) * (r - 1)) / c, 0.0) ** 0.5


def write(compared: pl.DataFrame, ranked: pl.DataFrame, folder: Path) -> None:
    """pairs.parquet and rank.parquet, with the meaning of their columns."""
    parquet.write_parquet(compared, folder / "pairs.parquet", PAIR_COLUMNS)
    parquet.write_parquet(ranked, folder / "rank.parquet", RANK_COLUMNS)


def _noise_of(noise: pl.DataFrame) -> dict[tuple, Noise]:
    return {
        (row["base_model"], row["metric"], row["variant"], row["concept"]): Noise(
            row["beyond"] ** 2, row["trainings"] - 1
        )
        for row in noise.iter_rows(named=True)
    }


def _added(
    measured: Mapping[tuple, Noise],
    labels: Mapping[str, Any],
    variants: Sequence[str],
    concepts: Sequence[str],
    compared: Images,
) -> Noise | None:
    """The variance that training both again adds to their difference; None where it was not measured.

    concepts: the names of the numbers, from 1, that the images that are compared have.
    """
    numbers = np.unique(compared.concepts)
    concept = concepts[int(numbers[0]) - 1] if len(numbers) == 1 else ALL_CONCEPTS
    trained = [variant for variant in variants if variant != BASELINE]
    found = [measured.get((labels["base_model"], labels["metric"], variant, concept)) for variant in trained]
    known = [noise for noise in found if noise is not None]
    if len(known) < len(trained):
        return None
    terms = [(noise.variance, noise.freedom) for noise in known]
    return Noise(sum(value for value, _ in terms), statistics.satterthwaite(terms)) if terms else None
