"""How well each metric predicts the answers of a human study, so that a metric can be chosen by it.

A metric predicts the image with the higher score. Three numbers are told, for each question, metric and encoder: the
share of decided answers that it predicts; and Kendall's tau-b and Spearman's rho, over pairs of images, of the
difference of the two scores with the share of raters who prefer the first image ('not sure' counts one half). Beside
them stands what one rater knows of another: how often two of them agree on a pair, and Krippendorff's alpha.

Raters and concepts are both a sample, and crossed: a rater answers about many concepts, a concept is seen by many
raters. Intervals are those of a bootstrap that draws both with replacement, each answer counting as often as its rater
and its concept were drawn: the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics
2007), whose variance is never too small on average. With few raters or concepts a percentile interval is narrow all
the same; `note` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from personalize_core.report.figures.agreement import RATERS
from personalize_core.study.alpha import nominal_alpha

DRAWS = 1_000
FEW = 10  # raters or concepts: with fewer an interval says that it is narrow

COLUMNS: dict[str, tuple[pl.DataType, str]] = {
    "question": (pl.String(), "text (fits the text), image (looks like the concept), or both (one forced choice)"),
    "metric": (pl.String(), f"name of the metric, as tables of scores have it; {RATERS!r}: how far raters agree"),
    "encoder": (pl.String(), f"the network whose features were compared; null for {RATERS!r}"),
    "headline": (pl.Boolean(), f"is it the first encoder of its list? null for {RATERS!r}"),
    "accuracy": (
        pl.Float64(),
        "share of the decided answers that prefer the image with the higher score, equal scores counting one half; of "
        f"{RATERS!r} the share of pairs of decided answers to one question about one pair that are equal",
    ),
    "accuracy_low": (pl.Float64(), "lower end of its 95 % interval; null where there is none, see `note`"),
    "accuracy_high": (pl.Float64(), "upper end of its 95 % interval"),
    "kendall": (
        pl.Float64(),
        "Kendall's tau-b, over pairs of images, of the difference of their scores with the share of raters who prefer "
        "the first ('not sure' counts one half); null where either does not vary",
    ),
    "kendall_low": (pl.Float64(), "lower end of its 95 % interval"),
    "kendall_high": (pl.Float64(), "upper end of its 95 % interval"),
    "spearman": (pl.Float64(), "Spearman's rank correlation of the same"),
    "spearman_low": (pl.Float64(), "lower end of its 95 % interval"),
    "spearman_high": (pl.Float64(), "upper end of its 95 % interval"),
    "alpha": (
        pl.Float64(),
        f"of {RATERS!r}: Krippendorff's alpha (nominal) of the decided answers; else null",
    ),
    "alpha_low": (pl.Float64(), "lower end of its 95 % interval"),
    "alpha_high": (pl.Float64(), "upper end of its 95 % interval"),
    "resampled": (pl.String(), "what the intervals draw anew: raters, concepts, or raters and concepts; null: nothing"),
    "answers": (pl.Int64(), "answers about pairs with both scores, 'not sure' among them"),
    "not_sure": (pl.Int64(), "how many of them are 'not sure'"),
    "pairs": (pl.Int64(), "different pairs of images"),
    "raters": (pl.Int64(), "raters"),
    "concepts": (pl.Int64(), "concepts"),
    "unscored": (pl.Int64(), "answers about pairs of which an image has no such score: they are left out"),
    "note": (pl.String(), "why something is absent, or to be read with care; null where there is nothing to say"),
}
SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})


@dataclass(frozen=True)
class Times:
    """How often each thing counts; all ones where nothing was resampled."""

    answers: np.ndarray  # (N,)
    pairs: np.ndarray  # (P,) of images: as often as its concept; 0 where none of its raters counts


@dataclass(frozen=True)
class Answers:
    """The answers to one question. A pair is two images; its concept is that of both."""

    pair: np.ndarray  # (N,) number of the pair, 0 to P - 1
    rater: np.ndarray  # (N,) number of the rater, 0 to R - 1
    first: np.ndarray  # (N,) 1: prefers the first image; 0: the second; 0.5: not sure
    concept: np.ndarray  # (P,) number of each pair's concept, 0 to C - 1

    @classmethod
    def of(cls, table: pl.DataFrame) -> Answers:
        """table: rows of what `answers.read` returned, of one question."""
        value = pl.col("preferred").replace_strict({"first": 1.0, "second": 0.0, "not sure": 0.5})
        pairs = table.select("pair", "concept").unique("pair").sort("pair")
        pair = np.searchsorted(pairs["pair"].to_numpy(), table["pair"].to_numpy())
        rater, concept = (
            column.rank("dense").to_numpy().astype(int) - 1 for column in (table["rater"], pairs["concept"])
        )
        return cls(pair, rater, table.select(value).to_series().to_numpy(), concept)


def agreement(table: pl.DataFrame, scores: pl.DataFrame, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """A row for each question, metric and encoder, and one for the raters themselves; as `COLUMNS`.

    Args:
        table: what `answers.read` returned.
        scores: metric, encoder, headline, pair, first, second: both images' scores, a row for each pair that has them.
    """
    rows = []
    for question in table["question"].unique(maintain_order=True).sort():
        own = table.filter(question=question)
        rows.append({"question": question, **_of_raters(own, draws, seed)})
        for (metric, encoder, headline), scored in scores.group_by(
            "metric", "encoder", "headline", maintain_order=True
        ):
            seen = own.filter(pl.col("pair").is_in(scored["pair"].to_list()))
            if len(seen):
                names = {"question": question, "metric": metric, "encoder": encoder, "headline": headline}
                rows.append(names | _of_metric(seen, scored, draws, seed) | {"unscored": len(own) - len(seen)})
    return pl.DataFrame(rows, schema=SCHEMA)


def _of_metric(table: pl.DataFrame, scored: pl.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    answers = Answers.of(table)
    by_pair = scored.filter(pl.col("pair").is_in(table["pair"].unique().to_list())).sort("pair")
    difference = (by_pair["first"] - by_pair["second"]).to_numpy()
    statistics: dict[str, Statistic] = {
        "accuracy": lambda times: accuracy(answers, difference, times.answers),
        "kendall": lambda times: kendall(difference, preference(answers, times.answers), times.pairs),
        "spearman": lambda times: spearman(difference, preference(answers, times.answers), times.pairs),
    }
    return _row(table, answers, statistics, draws, seed)


def _of_raters(table: pl.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    answers = Answers.of(table)
    statistics: dict[str, Statistic] = {
        "accuracy": lambda times: agreeing(answers, times.answers),
        "alpha": lambda times: alpha(answers, times.answers),
    }
    return {"metric": RATERS, "unscored": 0, **_row(table, answers, statistics, draws, seed)}


Statistic = Callable[[Times], float | None]


def _row(
    table: pl.DataFrame, answers: Answers, statistics: Mapping[str, Statistic], draws: int, seed: int
) -> dict[str, Any]:
    """Each statistic with its interval, and what it rests on."""
    raters, concepts = int(answers.rater.max()) + 1, int(answers.concept.max()) + 1
    drawn = [name for name, count in (("raters", raters), ("concepts", concepts)) if count > 1]
    row: dict[str, Any] = {
        "resampled": " and ".join(drawn) or None,
        "answers": len(table),
        "not_sure": int((answers.first == 0.5).sum()),
        "pairs": len(answers.concept),
        "raters": raters,
        "concepts": concepts,
    }
    resampled = resample(answers, draws, seed) if drawn else []
    once = Times(np.ones(len(answers.pair)), np.ones(len(answers.concept)))
    notes = [] if drawn else ["one rater and one concept: nothing to resample, no interval"]
    for name, statistic in statistics.items():
        row[name] = statistic(once)
        if row[name] is None:
            notes.append(f"{name} is undefined: nothing varies, or no answer is decided")
            continue
        found = np.array([value for each in resampled if (value := statistic(each)) is not None])
        if len(found) >= 0.9 * draws and np.ptp(found) > 0:
            row[f"{name}_low"], row[f"{name}_high"] = map(float, np.quantile(found, [0.025, 0.975]))
        elif drawn:
            notes.append(f"{name} has no interval: resampling shows no spread, or leaves too little")
    few = [f"{count} {name}" for name, count in (("raters", raters), ("concepts", concepts)) if 1 < count < FEW]
    if few:
        notes.append(f"only {' and '.join(few)}: intervals tend to be too narrow")
    for name, count in (("rater", raters), ("concept", concepts)):
        if count == 1 and drawn:
            notes.append(f"one {name}: intervals are about this one alone")
    return row | {"note": "; ".join(notes) or None}


def resample(answers: Answers, draws: int, seed: int) -> list[Times]:
    """Raters and concepts drawn with replacement. Where there is one, it stands in every draw once."""
    generator, found = np.random.default_rng([seed, 0xA9]), []
    raters, concepts = int(answers.rater.max()) + 1, int(answers.concept.max()) + 1
    for _ in range(draws):
        rater, concept = (
            np.bincount(generator.integers(count, size=count), minlength=count) for count in (raters, concepts)
        )
        of_pair = concept[answers.concept].astype(float)
        of_answer = rater[answers.rater] * of_pair[answers.pair]
        seen = np.bincount(answers.pair, of_answer, minlength=len(of_pair)) > 0
        found.append(Times(of_answer, of_pair * seen))
    return found


def accuracy(answers: Answers, difference: np.ndarray, weights: np.ndarray) -> float | None:
    """The share of decided answers that prefer the image with the higher score; equal scores count one half.

    difference: (P,) the first image's score less the second's. weights: (N,) how often each answer counts.
    """
    decided = answers.first != 0.5
    total = weights[decided].sum()
    if not total:
        return None
    right = 0.5 + 0.5 * np.sign(difference[answers.pair]) * (2 * answers.first - 1)
    return float((weights * right)[decided].sum() / total)


def preference(answers: Answers, weights: np.ndarray) -> np.ndarray:
    """(P,) the mean preference of a pair's raters for its first image; 0 where no rater counts."""
    count = len(answers.concept)
    total = np.bincount(answers.pair, weights, minlength=count)
    wins = np.bincount(answers.pair, weights * answers.first, minlength=count)
    return np.divide(wins, total, out=np.zeros(count), where=total > 0)


def kendall(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float | None:
    """Kendall's tau-b where each point stands there `weights` times; copies of a point are ties with each other."""
    kept = weights > 0
    x, y, w = x[kept], y[kept], weights[kept]
    both = np.triu(np.outer(w, w), 1)
    signs = [np.sign(values[:, None] - values[None, :]) for values in (x, y)]
    untied = [(both * (sign != 0)).sum() for sign in signs]
    if not all(untied):
        return None
    return float((both * signs[0] * signs[1]).sum() / np.sqrt(untied[0] * untied[1]))


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float | None:
    """Spearman's rho where each point stands there `weights` times: Pearson's of the mean ranks."""
    kept = weights > 0
    w = weights[kept]
    ranks = [_ranks(values[kept], w) for values in (x, y)]
    centred = [rank - np.average(rank, weights=w) for rank in ranks if len(rank)]
    if not centred:
        return None
    spread = [float((w * values**2).sum()) for values in centred]
    if not all(value > 1e-12 for value in spread):
        return None
    return float((w * centred[0] * centred[1]).sum() / np.sqrt(spread[0] * spread[1]))


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each point's mean rank among points that stand there `weights` times."""
    unique, place = np.unique(values, return_inverse=True)
    own = np.bincount(place, weights, minlength=len(unique))
    return (np.cumsum(own) - own + (own + 1) / 2)[place]


def agreeing(answers: Answers, weights: np.ndarray) -> float | None:
    """How often two decided answers of different raters about one pair are equal, over all such two."""
    same, both, _ = _pairs_of_raters(answers, weights)
    return float(same.sum() / both.sum()) if both.sum() else None


def alpha(answers: Answers, weights: np.ndarray) -> float | None:
    """Krippendorff's alpha (nominal) of the decided answers; see `alpha.nominal_alpha`."""
    same, both, counts = _pairs_of_raters(answers, weights)
    return nominal_alpha(same, both, counts)


def _pairs_of_raters(answers: Answers, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the decided answers about each pair of images, (P,) each: weight of two different raters' answers that are
    equal, and of any two; and (P, 2) the weight of either answer. A rater who was drawn twice makes no pair with
    himself."""
    decided = answers.first != 0.5
    pair, first, w = answers.pair[decided], answers.first[decided].astype(int), weights[decided]
    count = len(answers.concept)
    sums = np.stack([np.bincount(pair, w * (first == value), minlength=count) for value in (1, 0)], axis=1)
    squares = np.stack([np.bincount(pair, w**2 * (first == value), minlength=count) for value in (1, 0)], axis=1)
    same = (sums**2 - squares).sum(axis=1)
    both = sums.sum(axis=1) ** 2 - squares.sum(axis=1)
    return same, both, sums


def scores_of_pairs(pairs: pl.DataFrame, scores: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """metric, encoder, headline, pair, first, second: a row for each pair of which both images have the score.

    Args:
        pairs: pair, concept, text, first, second, first_sha256, second_sha256: of the study's key.
        scores: tables of scores of the variants, with `text`, the prompt as raters read it. An image that is another
            than raters saw has no score.
    """
    way, cell = ["metric", "encoder", "headline"], ["concept", "text"]
    columns = [*way, "variant", *cell, "image_sha256", "score"]
    table = pl.concat([each.select(columns) for each in scores]).unique(columns[:-1])  # equal images, equal scores
    found = pairs.select("pair", *cell, "first", "second", "first_sha256", "second_sha256")
    for side in ("first", "second"):
        keys = [*cell, side, f"{side}_sha256"]
        own = table.select(
            *way, *cell, pl.col("variant").alias(side), pl.col("image_sha256").alias(f"{side}_sha256"),
            pl.col("score").alias(f"score_of_{side}"),
        )  # fmt: skip
        found = found.join(own, on=keys if side == "first" else [*way, *keys])
    return (
        found.select(*way, "pair", pl.col("score_of_first").alias("first"), pl.col("score_of_second").alias("second"))
        .unique()
        .sort("metric", "encoder", "pair")
    )
