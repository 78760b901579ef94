"""What trainings that end when enough is learned save, and what that does to the scores.

Each variant of a method that may end early stands beside the same variant of the same recipe with a fixed number of
steps: image by image, of the same concepts, prompts and noise (`pairing`). Each interval stands alone, which shows a
loss sooner than intervals that are corrected for many comparisons do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from personalize_core.metrics import balance, pairing, summaries, tables
from personalize_core.metrics.ranking import PAIR_COLUMNS, UNDECIDED, verdict

BALANCE = "balance"  # beside the names of metrics
TOGETHER = "all together"  # in the place of a variant; none is called so, for names have no spaces

COLUMNS: dict[str, str] = {
    "variant": f"the variant whose trainings may end early, or {TOGETHER!r}: the mean over those that have a "
    "counterpart, each counting once",
    "fixed": "the same with a fixed number of steps; null where none was scored",
    "trainings": "over how many concepts the steps are",
    "steps": "mean number of steps taken",
    "steps_from": "of the training that took the fewest",
    "steps_to": "of the training that took the most",
    "allowed": "mean number of steps that the recipe allows",
    "saved": "share of the allowed steps that was not taken",
    "metric": f"a metric, or {BALANCE!r}: the geometric mean of identity and text alignment, of each image",
    "difference": "mean score of the variant less that of the other, on the same images; null where they share none",
    "low": "lower end of the 95 % interval of the difference, which stands alone",
    "high": "upper end of it",
    "verdict": f"{PAIR_COLUMNS['verdict']}; null where there is no counterpart",
    "over": summaries.SUMMARY_COLUMNS["over"],
    "images": "how many images of the variant were compared",
    "concepts": "of how many concepts",
}


@dataclass(frozen=True)
class EndedEarly:
    """A variant whose trainings may end early."""

    variant: str
    fixed: str | None  # the same with a fixed number of steps
    steps: Mapping[str, tuple[int, int]]  # concept -> steps taken, of how many

    @property
    def saved(self) -> float:
        taken, allowed = (sum(each) for each in zip(*self.steps.values(), strict=True))
        return 1 - taken / allowed


def what_it_changed(scores: pl.DataFrame, columns: Sequence[EndedEarly], metrics: Sequence[str]) -> pl.DataFrame:
    """A row for each variant and metric, and behind them rows for all together where there are several.

    Args:
        scores: a table of scores, of one base model and one encoder for each metric.
        metrics: of the table; `BALANCE` is added where both of its parts were measured.
    """
    measured = {metric: scores.filter(pl.col("metric") == metric) for metric in metrics}
    if {balance.TEXT, tables.shown(balance.IDENTITY, set(metrics))} <= set(metrics):
        measured[BALANCE] = balance.per_image(scores)
    compared = [each for each in columns if each.fixed]
    rows = [
        {
            "variant": each.variant,
            "fixed": each.fixed,
            **_steps(each),
            "metric": metric,
            **_compared([each], metric, table),
        }
        for each in columns
        for metric, table in measured.items()
    ]
    if len(compared) > 1:
        saved = sum(each.saved for each in compared) / len(compared)
        rows += [
            {"variant": TOGETHER, "saved": saved, "metric": metric, **_compared(compared, metric, table)}
            for metric, table in measured.items()
        ]
    integers = ["trainings", "steps_from", "steps_to", "images", "concepts"]
    words = ["variant", "fixed", "metric", "verdict", "over"]
    schema: dict[str, Any] = dict.fromkeys(COLUMNS, pl.Float64()) | dict.fromkeys(integers, pl.Int64())
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(words, pl.String()))


def _steps(column: EndedEarly) -> dict[str, Any]:
    taken, allowed = zip(*column.steps.values(), strict=True)
    count = len(taken)
    means = {"steps": sum(taken) / count, "allowed": sum(allowed) / count, "saved": column.saved}
    return {"trainings": count, "steps_from": min(taken), "steps_to": max(taken), **means}


def _compared(columns: Sequence[EndedEarly], metric: str, table: pl.DataFrame) -> dict[str, Any]:
    """The mean difference of these pairs of variants; without numbers where they have no image in common."""
    pairs = [(each.variant, each.fixed) for each in columns if each.fixed]
    if not pairs:
        return {}
    early, fixed = (pl.concat([table.filter(variant=name) for name in names]) for names in zip(*pairs, strict=True))
    sides = {"early": early, "fixed": fixed}
    both = summaries.with_prompts(pl.concat([side.with_columns(variant=pl.lit(name)) for name, side in sides.items()]))
    # the mean over pairs of variants, at the images that all of them have
    means = both.group_by("variant", *pairing.PLACE).agg(pl.col("score").mean(), pl.len().alias("count"))
    means = means.filter(count=len(pairs)).with_columns(foreground=pl.lit(None, pl.Float64()))
    images = pairing.images_of(means)
    if len(images) < len(sides):
        return {"verdict": UNDECIDED}
    found = pairing.compare(images["early"], images["fixed"])
    estimate = found.estimate
    if estimate is None:
        return {"verdict": UNDECIDED}
    ends = balance.range_of("score", 1) if metric == BALANCE else tables.range_of(metric, 1)
    estimate = estimate.within(*ends)
    return {
        "difference": estimate.mean, "low": estimate.low, "high": estimate.high, "over": estimate.over,
        "verdict": verdict(estimate.low, estimate.high), "images": len(found.one), "concepts": found.concepts,
    }  # fmt: skip
