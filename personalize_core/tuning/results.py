"""What a search leaves in data/tuning/METHOD: the answer, its evidence as tables and a plot, a section for params.yaml.

result.json       the answer in a sentence, both recipes, what they reach and take
trials.parquet    every trial, a row for each concept that it was measured on
report.parquet    both recipes on the concepts held back
trials.png        the trials over what they took
recipe.yaml       where the recipe that was found is better than today's: the section, with its evidence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from personalize_core.errors import listed
from personalize_core.files.atomic import read_result, write_bytes, write_json
from personalize_core.methods import MARK
from personalize_core.metrics import balance
from personalize_core.metrics.parquet import write_parquet
from personalize_core.metrics.statistics import Estimate
from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.tuning.budget import Budget, minutes
from personalize_core.tuning.measuring import AGAIN, NOTHING, Measured, Seconds
from personalize_core.tuning.plot import save_plot
from personalize_core.tuning.request import Request
from personalize_core.tuning.scratch import recipe_section
from personalize_core.tuning.search import COMPLETE, DIVERGED, PRUNED, Trial, spent_on
from personalize_core.tuning.space import Changes, with_changes
from personalize_core.tuning.winner import Verdict
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.metrics.balance import Means

RESULT, TRIALS, REPORT, PLOT, RECIPE = "result.json", "trials.parquet", "report.parquet", "trials.png", "recipe.yaml"
SCORES = {"balance": "score", "identity": "identity", "text": "text"}  # -> the column of `balance.per_image`

TRIAL_COLUMNS: dict[str, str] = {
    "trial": "number of the trial; 0 is today's recipe",
    "state": f"{COMPLETE!r}; {PRUNED!r}: ended early, worse than the median there; {DIVERGED!r}",
    "concept": f"name of the concept, or {ALL_CONCEPTS!r} that the trial was measured on",
    "balance": "geometric mean of DINO and CLIP-T, each at least 0, of an image; mean over images, prompts, concepts",
    "low": "lower end of its 95 % interval over concepts and prompts; only of a complete trial over all concepts",
    "high": "upper end",
    "identity": "mean DINO",
    "text": "mean CLIP-T",
    "steps": "training steps of the recipe",
    "training_seconds": "measured time of the training steps and of probes",
    "sampling_seconds": "measured time of sampling",
    "scoring_seconds": "measured time of scoring",
}
REPORT_COLUMNS: dict[str, str] = {
    "concept": f"name of a concept that was held back, or {ALL_CONCEPTS!r} of them",
    "score": "balance, identity (DINO) or text (CLIP-T)",
    "today": "mean by today's recipe",
    "found": "mean by the recipe that was found",
    "difference": "of the two, paired image by image",
    "low": "lower end of its 95 % interval; only over all concepts",
    "high": "upper end",
    "over": "what the interval lets vary",
}


@dataclass(frozen=True)
class Outcome:
    """All that is known when a search has ended."""

    store: Store
    asked: Request
    budget: Budget
    trials: Sequence[Trial]
    best: Trial  # trial 0, where no other was better; then nothing follows
    verdict: Verdict | None = None
    repeats: Seconds = NOTHING  # what they took
    today: Sequence[Measured] = ()  # on the concepts held back
    found: Sequence[Measured] = ()

    @property
    def is_better(self) -> bool:
        return bool(self.verdict and self.verdict.is_better)

    def steps(self, changes: Changes) -> int:
        return with_changes(self.budget.recipe, changes).training_steps


def write(outcome: Outcome, folder: Path) -> None:
    """All files of a result."""
    differences = _differences(outcome)
    write_json(folder / RESULT, _result(outcome, differences))
    write_parquet(_trials(outcome), folder / TRIALS, TRIAL_COLUMNS | _options(outcome))
    write_parquet(_report(outcome, differences), folder / REPORT, REPORT_COLUMNS)
    noise = outcome.verdict.noise_of_mean(len(outcome.asked.on)) if outcome.verdict else None
    save_plot(outcome.trials, outcome.best, noise, outcome.asked.method, folder / PLOT)
    if outcome.is_better:
        write_bytes(folder / RECIPE, section(outcome, differences).encode())


def read(folder: Path) -> dict[str, Any]:
    """What RESULT holds."""
    return read_result(folder / RESULT, AGAIN, answer=str, why=str, trials=list, today=dict, measured_seconds=dict)


def section(outcome: Outcome, differences: Mapping[str, Estimate]) -> str:
    """A section of params.yaml, ready to be pasted, under comments that say by what evidence."""
    params, method, changes = outcome.store.params, outcome.asked.method, outcome.best.changes
    name, recipe = recipe_section(params, method, changes)
    text = yaml.safe_dump({name: {method: {params.base_model: recipe}}}, sort_keys=False, width=110)
    lines = [
        f"`personalize tune {method}`, seed {params.seed}: trial {outcome.best.number} of {len(outcome.trials)} in a "
        f"budget of {outcome.asked.minutes:g} minutes.",
        f"Tuned on {listed(outcome.asked.on)}: balance {why(outcome)}.",
        f"On {listed(outcome.asked.report_on)}, which were held back: {_in_words(differences.get('balance'))}.",
    ]
    if MARK not in method:
        lines.append(f"To compare both recipes, write this one under `ablations` instead, as {method}{MARK}tuned.")
    return "".join(f"# {line}\n" for line in lines) + text


def why(outcome: Outcome) -> str:
    """The gain beside the noise of training."""
    verdict = outcome.verdict
    assert verdict
    return (
        f"{verdict.gain:+.4f} against today's recipe in trainings that it was not chosen by; beyond the noise of "
        f"training is a gain of {verdict.least:.4f} (95 %)"
    )


def _answer(outcome: Outcome) -> tuple[str, str]:
    if not outcome.verdict:
        return "keep today's recipe", "no trial had a higher balance"
    return ("change the recipe" if outcome.is_better else "keep today's recipe"), f"balance {why(outcome)}"


def _in_words(difference: Estimate | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return "balance " + ("unknown" if difference is None else f"{difference.mean:+.4f}")
    return f"balance {difference.mean:+.4f} (95 %: {difference.low:+.4f} to {difference.high:+.4f})"


def _differences(outcome: Outcome) -> dict[str, Estimate]:
    """Score -> found less today's on the concepts held back, with its interval."""
    if not outcome.found or not outcome.verdict:
        return {}
    found, today = (pl.concat([each.images for each in side]) for side in (outcome.found, outcome.today))
    noise = outcome.verdict.noise_of_difference(len(outcome.asked.report_on))
    estimates = {
        # the noise that was measured is that of the balance
        name: balance.difference(found, today, column, noise if name == "balance" else None)
        for name, column in SCORES.items()
    }
    return {name: estimate for name, estimate in estimates.items() if estimate}


def _result(outcome: Outcome, differences: Mapping[str, Estimate]) -> dict[str, Any]:
    answer, reason = _answer(outcome)
    asked, verdict = outcome.asked, outcome.verdict
    report = sum((each.seconds for each in (*outcome.today, *outcome.found)), NOTHING)
    return {
        "answer": answer,
        "why": reason,
        "method": asked.method,
        "variant": asked.variant,
        "base_model": outcome.store.params.base_model,
        "seed": outcome.store.params.seed,
        "budget_minutes": asked.minutes,
        "measured_seconds": {
            "trials": spent_on(outcome.trials).all, "repeats": outcome.repeats.all, "report": report.all
        },
        "tuned_on": list(asked.on),
        "reported_on": list(asked.report_on),
        "repeats": asked.repeats,
        "space": {name: [within.low, within.high] for name, within in outcome.budget.space.items()},
        "trials": [_trial(outcome, trial) for trial in outcome.trials],
        "best": outcome.best.number,
        "verdict": vars(verdict) if verdict else None,
        "today": _side(outcome, outcome.trials[0], outcome.today),
        "found": _side(outcome, outcome.best, outcome.found) if verdict else None,
        "differences": {name: vars(estimate) for name, estimate in differences.items()},
    }  # fmt: skip


def _trial(outcome: Outcome, trial: Trial) -> dict[str, Any]:
    low, high = trial.interval or (None, None)
    return {
        "trial": trial.number,
        "state": trial.state,
        "changes": dict(trial.changes),
        "steps": outcome.steps(trial.changes),
        "concepts": len(trial.parts),
        "balance": trial.balance,
        "low": low,
        "high": high,
        "seconds": trial.seconds.all,
    }


def _side(outcome: Outcome, trial: Trial, measured: Sequence[Measured]) -> dict[str, Any]:
    """A recipe, and what it reaches and takes on the concepts held back, where that was measured."""
    side: dict[str, Any] = {"changes": dict(trial.changes), "steps": outcome.steps(trial.changes)}
    if measured:
        side |= _means([each.means for each in measured])
        side["training_seconds"] = sum(each.seconds.training for each in measured) / len(measured)
    return side


def _means(parts: Sequence[Means]) -> dict[str, float | None]:
    if not parts:
        return dict.fromkeys(SCORES)
    return {name: sum(getattr(each, name) for each in parts) / len(parts) for name in SCORES}


def _options(outcome: Outcome) -> dict[str, str]:
    return {name: f"{name} of the recipe" for name in outcome.budget.space}


def _trials(outcome: Outcome) -> pl.DataFrame:
    rows = []
    for trial in outcome.trials:
        about = {"trial": trial.number, "state": trial.state, "steps": outcome.steps(trial.changes), **trial.changes}
        for part in trial.parts:
            rows.append({**about, "concept": part.concept, **_means([part.means]), **_seconds(part.seconds)})
        low, high = trial.interval or (None, None)
        means = _means([part.means for part in trial.parts]) | {"balance": trial.balance}
        rows.append({**about, "concept": ALL_CONCEPTS, **means, "low": low, "high": high, **_seconds(trial.seconds)})
    schema: dict[str, Any] = dict.fromkeys([*TRIAL_COLUMNS, *_options(outcome)], pl.Float64())
    schema |= {"trial": pl.Int64(), "steps": pl.Int64(), "state": pl.String(), "concept": pl.String()}
    return pl.DataFrame(rows, schema=schema)


def _seconds(seconds: Seconds) -> dict[str, float]:
    return {f"{name}_seconds": value for name, value in vars(seconds).items()}


def _report(outcome: Outcome, differences: Mapping[str, Estimate]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for today, found in zip(outcome.today, outcome.found, strict=True):
        for name in SCORES:
            before, after = getattr(today.means, name), getattr(found.means, name)
            rows.append({"concept": today.concept, "score": name, "today": before, "found": after})
            rows[-1]["difference"] = after - before
    for name, estimate in differences.items():
        sides = {
            side: _means([each.means for each in measured])[name]
            for side, measured in (("today", outcome.today), ("found", outcome.found))
        }
        spread = {"difference": estimate.mean, "low": estimate.low, "high": estimate.high, "over": estimate.over}
        rows.append({"concept": ALL_CONCEPTS, "score": name, **sides, **spread})
    words = dict.fromkeys(["concept", "score", "over"], pl.String())
    return pl.DataFrame(rows, schema=dict.fromkeys(REPORT_COLUMNS, pl.Float64()) | words)


def in_words(result: Mapping[str, Any]) -> list[str]:
    """The answer for people, a sentence for each line."""
    seconds = result["measured_seconds"]
    lines = [
        f"{len(result['trials'])} trials took {minutes(seconds['trials'])} of {result['budget_minutes']:g} minutes, "
        f"repeats {minutes(seconds['repeats'])}, the report on the concepts held back {minutes(seconds['report'])}.",
        f"Answer: {result['answer']}: {result['why']}.",
    ]
    return lines
