"""The comparison for a terminal: read from its tables, without what computes or plots them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.files.atomic import read_result
from personalize_core.methods import BASELINE
from personalize_core.metrics import costs, pairing, ranking, tables
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.report.display_names import in_words
from personalize_core.workspace.store import REFERENCES

COPYING = "copying.parquet"  # only where images are held out; metrics/held_out.py
NOISE = "training_noise.parquet"  # only where a method was trained again
METRICS = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}  # in the order of tables for people


def table(folder: Path, measured: Path) -> list[list[str]]:
    """The summary over all concepts for a terminal: a heading, then a row per variant, the baseline first.

    A variant that was not scored on all concepts says on how many.

    measured: the table of costs.
    """
    summary = _headline(folder / "summary.parquet")
    metrics = metrics_of(summary["metric"])
    path = folder / "differences.parquet"
    gains = {}
    if path.is_file():
        rows = _headline(path).filter(metric=tables.shown("dino", metrics))
        gains = {row["variant"]: row for row in rows.iter_rows(named=True)}
    baseline = read_result(folder / "summary.json", baseline=str)["baseline"]
    order = {baseline: 0, REFERENCES: 2}
    variants = sorted(summary["variant"].unique(), key=lambda name: (order.get(name, 1), name))
    rows = training_noise(folder).iter_rows(named=True)
    noises = {(row["variant"], row["metric"]): f" noise {row['between']:.3f}" for row in rows}
    taken = pl.read_parquet(measured).filter(concept=tables.ALL_CONCEPTS) if measured.is_file() else pl.DataFrame()
    cost = {row["variant"]: costs.in_words(row) for row in taken.iter_rows(named=True)}
    coverage = _coverage(folder)
    over = "the base model" if baseline == BASELINE else in_words(baseline)
    lines = [["Variant", *metrics.values(), f"DINO over {over}", "Cost"]]
    for variant in variants:
        scores = {row["metric"]: row for row in summary.filter(pl.col("variant") == variant).iter_rows(named=True)}
        cells = [
            _interval(scores[metric], "mean") + noises.get((variant, metric), "") if metric in scores else "-"
            for metric in metrics
        ]
        gained = _interval(gains[variant], "difference") if variant in gains else "-"
        lines.append([in_words(variant) + coverage.note(variant), *cells, gained, cost.get(variant, "-")])
    return lines


def metrics_of(there: pl.Series) -> dict[str, str]:
    """METRICS; with the images trained on where no concept has images held out, though some were asked for."""
    names = {metric: tables.shown(metric, set(there)) for metric in METRICS}
    return {name: METRICS[metric] + ", trained on" * (name != metric) for metric, name in names.items()}


def training_noise(folder: Path) -> pl.DataFrame:
    """The noise of training over all concepts, a row for each variant and metric; empty where nothing was repeated."""
    path = folder / NOISE
    return pl.read_parquet(path).filter(concept=tables.ALL_CONCEPTS) if path.is_file() else pl.DataFrame()


def verdicts(folder: Path) -> list[list[str]]:
    """The ranking for a terminal: a heading, then a row per metric and variant, the best mean first."""
    ranked = pl.read_parquet(folder / "rank.parquet")
    lines = [["By", "Place", "Variant", "Verdict"]]
    for metric, words in metrics_of(ranked["metric"]).items():
        for row in ranked.filter(metric=metric).iter_rows(named=True):
            places = {row["place_from"], row["place_to"]}
            parts = [
                f"{verb} {', '.join(map(in_words, row[column].split(', ')))}"
                for verb, column in (("above", "above"), (f"{ranking.UNDECIDED} against", "cannot_tell_from"))
                if row[column]
            ]
            lines.append(
                [words, " to ".join(map(str, sorted(places))), in_words(row["variant"]), "; ".join(parts) or "-"]
            )
    return lines


def pairing_of(folder: Path) -> str:
    """How variants were compared, where not all of them image by image; else nothing."""
    pairs = _shown(pl.read_parquet(folder / "pairs.parquet"))
    ways = [way for way in pairing.WAYS if way in set(pairs["pairing"])]
    if set(ways) <= {pairing.BY_NOISE}:
        return ""
    return f"Images made elsewhere share no noise with ours. Pairs of variants were compared by: {'; '.join(ways)}"


def gaps(folder: Path) -> str:
    """What is to be known where not all variants were scored on all concepts; else nothing."""
    coverage = _coverage(folder)
    if coverage.whole:
        return ""
    return (
        f"Not every variant was scored on all {coverage.total} concepts: a mean is over those that the variant has, so "
        "means do not compare; verdicts do, for they look at any two on the images that both have"
    )


def intervals_are_over(folder: Path) -> str:
    """What the intervals of `table` let vary, in words."""
    summary = _headline(folder / "summary.parquet")
    sampled = summary.filter(pl.col("variant") != REFERENCES)
    over = sorted(set(sampled["over"].drop_nulls()))
    held = "" if all("concepts" in name for name in over) else ", about these concepts alone"
    return f"95 % intervals over {' and over '.join(over)}{held}" if over else "nothing was repeated: no intervals"


def _coverage(folder: Path) -> ConceptCoverage:
    summary = pl.read_parquet(folder / "summary.parquet").filter("headline")
    return ConceptCoverage.of_summary(summary, metrics_of(summary["metric"]))


def _interval(row: dict[str, Any], name: str) -> str:
    if row["low"] is None:
        return f"{row[name]:.3f}"
    return f"{row[name]:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _headline(path: Path) -> pl.DataFrame:
    """A summary's rows over all concepts, by the first encoder of each list."""
    return _shown(pl.read_parquet(path).filter(pl.col("headline") & (pl.col("concept") == tables.ALL_CONCEPTS)))


def _shown(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of the metrics that the table shows: what is said beside it is about no other."""
    return frame.filter(pl.col("metric").is_in(list(metrics_of(frame["metric"]))))
