"""Trainings that ended when enough was learned: the steps saved, and what that did to the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from personalize_core.errors import listed
from personalize_core.methods import method_of
from personalize_core.metrics import ended_early as measured
from personalize_core.metrics.ended_early import BALANCE, COLUMNS, TOGETHER, EndedEarly
from personalize_core.metrics.ranking import HIGHER, LOWER, UNDECIDED
from personalize_core.report.display_names import in_words
from personalize_core.report.evidence import METRICS, TEXT, Evidence, Learned, MethodTold
from personalize_core.report.table import Table
from personalize_core.report.verdicts import interval

BY = {  # what a probe is chosen by
    "balance": "the geometric mean of identity, with the images held out, and text alignment",
    "identity": "likeness to the images held out",
    "text": "CLIP-T with the class noun",
}

NOTE = (
    "Each variant is compared with the same recipe and a fixed number of steps, on images of the same concepts, "
    "prompts and noise. Steps are the mean over concepts, the fewest and the most. Each interval stands alone, so that "
    "a loss is seen sooner than by the verdicts on any two variants, which correct for looking at many. The share of "
    "the time saved is smaller than that of the steps, for watching a training takes time."
)
MEAN = pl.col("value").mean()


def ended_early(evidence: Evidence) -> Table:
    """A row for each variant whose trainings may end early: steps, differences with verdicts, and what was kept."""
    columns = _columns(evidence)
    metrics = [metric for metric in (evidence.identity, TEXT) if metric in evidence.metrics]
    frame = measured.what_it_changed(evidence.scores, [column for column, _ in columns], metrics)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in frame.iter_rows(named=True):
        found.setdefault(row["variant"], {})[row["metric"]] = row
    names = {metric: METRICS[metric] for metric in metrics} | {BALANCE: "Balance"}
    names = {metric: words for metric, words in names.items() if metric in set(frame["metric"])}
    kept = {column.variant: words for column, method in columns if (words := _kept(method))}
    shown = [
        [
            "All together" if variant == TOGETHER else in_words(variant),
            *_steps(next(iter(of.values()))),
            *(cell for metric in names for cell in (interval(of[metric], "difference"), of[metric]["verdict"] or "-")),
            *([kept.get(variant, "-" if variant == TOGETHER else "last step")] if kept else []),
        ]
        for variant, of in found.items()
    ]
    heading = ["Variant", "Steps", "Of", "Saved"]
    heading += [cell for words in names.values() for cell in (f"{words} [95 %]", "Verdict")]
    heading += ["Kept"] if kept else []
    note = f"{_in_all(found, names)} {NOTE} {_what_is_kept(columns)}" if found else ""
    return Table("ended_early", "Ended when it had learned", frame, COLUMNS, [heading, *shown], note)


def ended_in_words(learned: Learned) -> str:
    """What was done otherwise than for a fixed number of steps; empty if nothing."""
    found = []
    for name, stage in learned.stages.items():
        kept = f", kept as it was at step {stage['kept']}" if stage["kept"] != stage["steps"] else ""
        if stage["learned"] or kept:
            found.append(f"{name.replace('_', ' ')}: {stage['steps']} of {stage['of']} steps{kept}")
    if chosen := _chosen(learned):
        found.append(chosen)
    return "; ".join(found)


def _columns(evidence: Evidence) -> list[tuple[EndedEarly, MethodTold]]:
    """The variants of methods whose trainings may end early, each with the same that may not."""
    found = []
    for method in evidence.methods:
        steps = {one.concept: _taken(one) for one in method.learned if one.stages and _adaptive(one)}
        if not steps:
            continue
        fixed = next((other for other in evidence.methods if _is_fixed(other, method)), None)
        for variant in method.variants:
            beside = f"{fixed.name}{variant.removeprefix(method.name)}" if fixed else None
            there = beside if fixed and beside in fixed.variants else None
            found.append((EndedEarly(variant, there, steps), method))
    return found


def _is_fixed(other: MethodTold, method: MethodTold) -> bool:
    """Is it the same method by the same recipe, but for a fixed number of steps?"""
    if not other.learned or method_of(other.name) != method_of(method.name):
        return False
    theirs = {one.concept: one for one in other.learned}
    both = [(one, theirs[one.concept]) for one in method.learned if one.concept in theirs]
    return bool(both) and all(not _adaptive(its) and _recipe(its) == _recipe(one) for one, its in both)


def _recipe(learned: Learned) -> dict[str, Any]:
    return {option: value for option, value in learned.described.get("config", {}).items() if option != "adaptive"}


def _adaptive(learned: Learned) -> Mapping[str, Any]:
    return learned.described.get("config", {}).get("adaptive") or {}


def _taken(learned: Learned) -> tuple[int, int]:
    taken, allowed = (sum(stage[name] for stage in learned.stages.values()) for name in ("steps", "of"))
    return taken, allowed


def _steps(row: Mapping[str, Any]) -> list[str]:
    saved = f"{100 * row['saved']:.0f} %"
    if row["steps"] is None:
        return ["-", "-", saved]
    low, high = row["steps_from"], row["steps_to"]
    between = "" if low == high else f" ({low} to {high})"
    return [f"{row['steps']:.0f}{between}", f"{row['allowed']:.0f}", saved]


def _kept(method: MethodTold) -> str:
    """Which probe was kept, over all concepts; empty where what the last step left was."""
    if not (best := _chose(method)):
        return ""
    steps = [list(one.stages.values())[-1]["kept"] for one in best]
    at = f"step {min(steps)}" if min(steps) == max(steps) else f"steps {min(steps)} to {max(steps)}"
    return f"best by {listed(sorted({_adaptive(one)['by'] for one in best}))}: {at}"


def _what_is_kept(columns: Sequence[tuple[EndedEarly, MethodTold]]) -> str:
    by = sorted({_adaptive(one)["by"] for _, method in columns for one in _chose(method)})
    if not by:
        return "What the last step left was kept."
    return f"Best is the best probe of the last stage, by {listed([f'{name} ({BY[name]})' for name in by])}."


def _chose(method: MethodTold) -> list[Learned]:
    """Trainings of which the best probe was kept."""
    return [one for one in method.learned if one.stages and _adaptive(one).get("keep") == "best"]


def _chosen(learned: Learned) -> str:
    """Which probe was kept, and how much better it was than the last one; empty where none was chosen."""
    how = _adaptive(learned)
    if how.get("keep") != "best" or learned.probes is None:
        return ""
    name, stage = list(learned.stages.items())[-1]
    seen = learned.probes.filter(pl.col("stage") == name, pl.col("metric").is_in(["identity", "text"]))
    moments = seen["step"].unique().sort().to_list()
    means = {(step, metric): value for step, metric, value in seen.group_by("step", "metric").agg(MEAN).iter_rows()}

    def there(step: int) -> str:
        return f"identity {means[step, 'identity']:.3f}, text {means[step, 'text']:.3f}"

    which = f"of the {len(moments)} probes of {name.replace('_', ' ')} that of step {stage['kept']} was kept"
    beside = (
        f" ({there(moments[-1])} at step {moments[-1]}, the last)" if stage["kept"] != moments[-1] else ", the last"
    )
    return f"{which}, the best by {how['by']}, {BY[how['by']]}: {there(stage['kept'])}{beside}"


def _in_all(found: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Mapping[str, str]) -> str:
    """The table in a sentence: how many steps were saved, and how many verdicts there are of each kind."""
    own = {variant: of for variant, of in found.items() if variant != TOGETHER}
    saved = sum(next(iter(of.values()))["saved"] for of in own.values()) / len(own)
    parts = []
    for metric, words in names.items():
        verdicts = [of[metric]["verdict"] for of in own.values() if of[metric]["fixed"]]
        counted = [f"{count} {kind}" for kind in (LOWER, UNDECIDED, HIGHER) if (count := verdicts.count(kind))]
        parts += [f"{words}: {', '.join(counted)}"] if counted else []
    said = f"; {'; '.join(parts)}" if parts else ""
    return f"{100 * saved:.0f} % of the steps were saved{said}."
