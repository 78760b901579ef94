"""The verdicts of metrics/ranking.py in words, and nothing beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from personalize_core.errors import listed
from personalize_core.methods import BASELINE
from personalize_core.metrics.pairing import BY_NOISE, BY_PROMPT, BY_SEED, UNPAIRED
from personalize_core.metrics.ranking import HIGHER, LOWER, UNDECIDED
from personalize_core.report.display_names import in_words
from personalize_core.report.evidence import ASKED, Evidence

MANY = 4  # variants that are named one by one, at most, where they are all but those that are named before


@dataclass(frozen=True)
class Verdict:
    """What the scores say by one metric."""

    metric: str
    question: str  # e.g. "Which keeps the concept best?"
    answer: str  # a variant, or "undecided"
    sentences: Sequence[str]
    told: bool  # one variant is above all others


def verdicts(evidence: Evidence) -> list[Verdict]:
    """One for each metric that was measured, identity first."""
    return [_verdict(evidence, metric) for metric in evidence.metrics]


def _verdict(evidence: Evidence, metric: str) -> Verdict:
    ranked = list(evidence.rank.filter(metric=metric).iter_rows(named=True))
    question = f"Which {ASKED[metric]} best?"
    if len(ranked) < 2:
        return Verdict(metric, question, UNDECIDED, ["There is only one variant."], False)
    first = ranked[0]
    told = first["place_from"] == first["place_to"] == 1
    sentences = [_best(first, ranked, evidence, metric) if told else _undecided(ranked)]
    sentences += _against_the_baseline(evidence, metric)
    return Verdict(metric, question, in_words(first["variant"]) if told else UNDECIDED, sentences, told)


def _best(first: dict[str, Any], ranked: Sequence[dict[str, Any]], evidence: Evidence, metric: str) -> str:
    beside = [row for other in ranked[1:] if (row := between(evidence, metric, first["variant"], other["variant"]))]
    difference = min(beside, key=lambda row: row["difference"])  # not by the means: these may be over other concepts
    others = len(ranked) - 1
    above = "the other" if others == 1 else f"each of the {others} others"
    best, next_ = in_words(first["variant"]), in_words(difference["other"])
    count = difference["concepts"]
    on = "the one concept that both have" if count == 1 else f"the {count} concepts that both have"
    shared = "" if evidence.coverage.whole else f" on {on}"
    return (
        f"{_capital(best)} is above {above} at 95 %; above {next_}, the nearest, by "
        f"{interval(difference, 'difference')}{shared}."
    )


def _undecided(ranked: Sequence[dict[str, Any]]) -> str:
    """Of those that nothing is above, no two can be told apart: else one would be above the other."""
    open_ = [row["variant"] for row in ranked if row["place_from"] == 1]
    if len(open_) == 1:
        unclear = ranked[0]["cannot_tell_from"].split(", ")
        best = _capital(in_words(open_[0]))
        return f"{best} is below no other at 95 %, but it cannot be told apart from {_names(unclear)}."
    if len(open_) == len(ranked):
        return f"No two of the {len(ranked)} variants can be told apart at 95 %."
    others = [row["variant"] for row in ranked if row["place_from"] > 1]
    if not open_:  # any two are compared on the images that both have, so that verdicts may go round in a circle
        return "Every variant is below some other at 95 %, for any two were compared on other images."
    few = len(open_) <= max(MANY, len(others))
    best = _names(open_) if few else f"{len(open_)} of the {len(ranked)} variants"
    below = f"all {len(others)} others" if few and len(others) > MANY else _names(others)
    return f"The best may be any of {best}: no two of these can be told apart at 95 %. Below some variant: {below}."


def _against_the_baseline(evidence: Evidence, metric: str) -> list[str]:
    """Each other variant beside the baseline."""
    found: dict[str, list[str]] = {HIGHER: [], UNDECIDED: [], LOWER: []}
    for variant in evidence.variants:
        if variant != evidence.baseline and (row := between(evidence, metric, variant, evidence.baseline)):
            found[row["verdict"]].append(variant)
    words = {HIGHER: "above it: {}", UNDECIDED: "undecided: {}", LOWER: "below it: {}"}
    there = sorted((len(names), verdict) for verdict, names in found.items() if names)
    parts = [words[verdict].format(_names(found[verdict])) for _, verdict in there]
    if there and there[-1][0] > MANY:  # the last part, and the longest
        count, verdict = there[-1]
        parts[-1] = words[verdict].format(f"all {count}" if len(there) == 1 else f"all {count} others")
    return [f"Compared with {baseline_in_words(evidence.baseline)}: {'; '.join(parts)}."] if parts else []


def baseline_in_words(baseline: str) -> str:
    return "the base model, which learned nothing" if baseline == BASELINE else f"the baseline, {in_words(baseline)}"


def between(evidence: Evidence, metric: str, variant: str, other: str) -> dict[str, Any] | None:
    """The row of two variants, told from the side of the first; None where they were not compared."""
    rows = evidence.pairs.filter(pl.col("metric") == metric)
    for row in rows.iter_rows(named=True):
        if (row["variant"], row["other"]) == (variant, other):
            return row
        if (row["variant"], row["other"]) == (other, variant):
            return row | _turned(row)
    return None


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    turned = {HIGHER: LOWER, LOWER: HIGHER, UNDECIDED: UNDECIDED}
    values = {"difference": row["difference"], "low": row["high"], "high": row["low"]}
    return {
        "variant": row["other"],
        "other": row["variant"],
        "verdict": turned[row["verdict"]],
        **{name: None if value is None else -value for name, value in values.items()},
    }


def notes(evidence: Evidence) -> list[str]:
    """What all verdicts rest on, and what they do not cover."""
    if evidence.pairs.is_empty():
        return []
    found = []
    over = sorted(set(evidence.pairs["over"].drop_nulls()))
    pairs = evidence.pairs["comparisons"].max()
    if over:
        together = "" if pairs == 1 else f", simultaneously for all {pairs} pairs of a score"
        found.append(f"Verdicts hold at 95 %{together}; they generalize over {listed(over)}.")
    else:
        found.append("Nothing was repeated, so no difference has an interval and no verdict is possible.")
    if over and not any("concepts" in name for name in over):
        these = "this concept" if len(evidence.concepts) == 1 else "these concepts"
        found.append(f"They are about {these} alone: how others of the kind would come out is not known.")
    if not evidence.coverage.whole:
        found.append(_gaps(evidence))
    if paired := _pairing(evidence):
        found.append(paired)
    unmeasured = evidence.pairs["training_noise"].null_count()
    if unmeasured == len(evidence.pairs):
        found.append("How much training again with another seed would change is not measured.")
    elif unmeasured:
        found.append("How much training again with another seed would change is measured, and counted in, for some.")
    else:
        found.append("How much training again with another seed changes is counted in.")
    return found


def _gaps(evidence: Evidence) -> str:
    """Which variants lack concepts, and what then compares."""
    coverage = evidence.coverage
    lacking = [f"{in_words(one)} on {coverage.count(one)}" for one in evidence.variants if not coverage.is_whole(one)]
    fewest, most = evidence.pairs["concepts"].min(), evidence.pairs["concepts"].max()
    shared = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"Not every variant was scored on all {coverage.total} concepts ({listed(lacking)}): any two are compared on "
        f"the images that both have, of {shared} concepts, and a mean is over the variant's own."
    )


def _pairing(evidence: Evidence) -> str:
    """How variants were compared, where not all of them image by image."""
    ways = dict(evidence.pairs.select("variant", "other", "pairing").unique()["pairing"].value_counts().rows())
    if set(ways) <= {BY_NOISE}:
        return ""
    words = {
        BY_NOISE: "by images of the same prompt and noise",
        BY_SEED: "by images of the same prompt and seed",
        BY_PROMPT: "by the means of prompts that both have, for their images share no noise",
        UNPAIRED: "by the means of concepts, for they have other prompts, which makes a difference less certain",
    }
    parts = [f"{ways[way]} {text}" for way, text in words.items() if way in ways]
    return f"How pairs of variants were compared: {', '.join(parts)}."


def caution(evidence: Evidence) -> str:
    """One line about what these scores are evidence of; empty where there is nothing to warn of."""
    if evidence.base_model != "mini":
        return ""
    return (
        "Sampled by the embedded miniature, 64 x 64 pixels of a synthetic world. It shows that the software works: "
        "its scores are no evidence about Stable Diffusion."
    )


def interval(row: dict[str, Any] | None, name: str) -> str:
    """A number with its interval, for people."""
    if row is None or row[name] is None:
        return "-"
    if row["low"] is None:
        return f"{row[name]:.3f}"
    return f"{row[name]:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _names(variants: Sequence[str]) -> str:
    return listed(map(in_words, variants))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
