"""What to try next: Optuna's TPE sampler and median pruner, asked so that a search that was killed asks the same again.

The journal (Optuna's JournalStorage on a file of JSON lines) holds trials that have ended, each written at once. What
comes next is a function of them, of the seed and of what the budget has room for: the sampler is made anew for every
trial, with a seed of its own, and told of all that came before. So a trial that was cut off is suggested again, number
for number, and the steps find what it had done already. How long that took decides nothing here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.errors import InputError
from personalize_core.methods.recipe import Range
from personalize_core.metrics.balance import Means
from personalize_core.randomness import seed_for
from personalize_core.tuning.measuring import NOTHING, Measured, Seconds
from personalize_core.tuning.space import rounded

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages.journal import JournalFileOpenLock
    from optuna.trial import FrozenTrial

RANDOM_FIRST = 4  # trials before TPE has something to go by, today's recipe among them; Optuna's ten are half a budget
MOST_SUGGESTIONS = 50  # for one trial
UNPRUNED_FIRST = 3  # complete trials before one is pruned: a median of fewer says little
STUDY = "search"  # the one in the journal
COMPLETE, PRUNED, DIVERGED = "complete", "pruned", "diverged"


@dataclass(frozen=True)
class Part:
    """What is known of a trial from one concept."""

    concept: str
    means: Means
    seconds: Seconds
    half_way: float | None = None  # the balance that a probe saw half way through its training


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried, and what came of it."""

    number: int  # 0 is today's recipe
    changes: Mapping[str, float]
    parts: Sequence[Part]  # of a pruned or diverged trial not of all concepts
    state: str
    interval: tuple[float, float] | None = None  # of the balance, over concepts; 95 %
    lost: float = 0.0  # seconds of a training that diverged or was pruned, which is part of no concept

    @property
    def balance(self) -> float | None:
        """Mean over its concepts; of one that diverged 0, the least there is; None if it was pruned in its first."""
        if self.state == DIVERGED:
            return 0.0
        return running_mean([part.means.balance for part in self.parts]) if self.parts else None

    @property
    def reached(self) -> float:
        """The balance of a complete trial."""
        assert self.balance is not None
        return self.balance

    @property
    def seconds(self) -> Seconds:
        return sum((part.seconds for part in self.parts), Seconds(self.lost, 0.0, 0.0))


def running_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The complete trial with the highest balance; of equals the first."""
    return max((trial for trial in trials if trial.state == COMPLETE), key=lambda trial: trial.reached)


class Journal:
    """The trials of one search that have ended. One process at a time opens it: it holds the search's lock."""

    def __init__(self, path: Path, space: Mapping[str, Range]) -> None:
        """Raises InputError if the file is damaged."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_to_whole_lines(path)
        try:
            storage = JournalStorage(JournalFileBackend(str(path), _held(path)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); remove it, and the search starts again") from None
        self.space = space
        if optuna.get_all_study_names(storage):
            self._study = optuna.load_study(study_name=STUDY, storage=storage)
        else:
            self._study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize")

    @property
    def trials(self) -> list[Trial]:
        return [_read(trial) for trial in self._study.get_trials(deepcopy=False)]

    def add(self, trial: Trial) -> None:
        """One line of the journal, so that a trial is there whole or not at all."""
        self._study.add_trial(_written(trial, self.space))

    def suggestions(self, today: Mapping[str, float], seed: int) -> Iterator[Suggestion]:
        """What to try after the trials that have ended: the first choice, and others for where it takes too long.

        Before any has ended it is today's recipe alone.
        """
        import optuna

        ended = self._study.get_trials(deepcopy=False)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_FIRST, seed=seed_for(seed, "tuning", len(ended)) % 2**32, multivariate=True
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_FIRST)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
            half_way = optuna.create_study(direction="maximize", pruner=pruner)
        study.add_trials(ended)
        half_way.add_trials([seen for trial in ended if (seen := _seen_by_probes(trial))])
        if not ended:
            yield Suggestion(0, dict(today), study, half_way)
            return
        for _ in range(MOST_SUGGESTIONS):
            asked = study.ask(_distributions(self.space))
            changes = {name: rounded(asked.params[name], within) for name, within in self.space.items()}
            yield Suggestion(len(ended), changes, study, half_way)


@dataclass(frozen=True)
class Suggestion:
    """A recipe to try."""

    number: int
    changes: dict[str, float]
    _study: Study  # a copy in memory, of the trials that have ended

    _half_way: Study  # of the same, with what probes saw in the place of what was scored

    def is_hopeless(self, balances: Sequence[float]) -> bool:
        """Is it worse, so far, than the median of the complete trials was at this point?

        balances: of the concepts so far, in the search's order.
        """
        return _below_median(self._study, balances)

    def looks_hopeless(self, seen: Sequence[float | None]) -> bool:
        """The same half way through the training on the last of these concepts, by what probes saw.

        A probe is a few images of few steps, so it is compared with probes alone.
        """
        known = [value for value in seen if value is not None]
        return len(known) == len(seen) and _below_median(self._half_way, known)


def _below_median(study: Study, values: Sequence[float]) -> bool:
    import optuna

    # its mean so far alone: Optuna would take the best of its means, which says which of the concepts is easy
    mean = running_mean(values)
    so_far = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED, intermediate_values={len(values): mean}, value=mean
    )
    return study.pruner.prune(study, so_far)


def _seen_by_probes(trial: FrozenTrial) -> FrozenTrial | None:
    """A complete trial whose trainings were all looked at."""
    import optuna

    seen = [part["half_way"] for part in trial.user_attrs["parts"]]
    if trial.user_attrs["state"] != COMPLETE or None in seen:
        return None
    return optuna.trial.create_trial(value=trial.value, intermediate_values=_by_step(seen))


def _written(trial: Trial, space: Mapping[str, Range]) -> FrozenTrial:
    import optuna

    ended_early = trial.state == PRUNED
    values = [part.means.balance for part in trial.parts]
    parts = [asdict(part) for part in trial.parts]
    state = optuna.trial.TrialState.PRUNED if ended_early else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(
        state=state,
        value=trial.balance,
        params=dict(trial.changes),
        distributions=_distributions(space),
        intermediate_values=_by_step(values),
        user_attrs={"parts": parts, "state": trial.state, "interval": trial.interval, "lost": trial.lost},
    )


def _read(trial: FrozenTrial) -> Trial:
    about: dict[str, Any] = trial.user_attrs
    parts = [
        Part(each["concept"], Means(**each["means"]), Seconds(**each["seconds"]), each["half_way"])
        for each in about["parts"]
    ]
    interval = about["interval"] and (about["interval"][0], about["interval"][1])
    return Trial(trial.number, trial.params, parts, about["state"], interval, about["lost"])


def part_of(measured: Measured) -> Part:
    return Part(measured.concept, measured.means, measured.seconds, measured.half_way)


def spent_on(trials: Sequence[Trial]) -> Seconds:
    return sum((trial.seconds for trial in trials), NOTHING)


def _by_step(values: Sequence[float]) -> dict[int, float]:
    """After each concept the mean so far."""
    return {count: running_mean(values[:count]) for count in range(1, len(values) + 1)}


def _distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    from optuna.distributions import FloatDistribution, IntDistribution

    return {
        name: IntDistribution(within.low, within.high, log=True)
        if isinstance(within.low, int) and isinstance(within.high, int)
        else FloatDistribution(within.low, within.high, log=True)
        for name, within in space.items()
    }


def _held(path: Path) -> JournalFileOpenLock:
    """Optuna's lock is a link that a killed process leaves behind; ours (`Store.alone`) goes with its process."""
    from optuna.storages.journal import JournalFileOpenLock

    class Held(JournalFileOpenLock):
        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    return Held(str(path))


def _cut_to_whole_lines(path: Path) -> None:
    """Drop what a full disk left of a last line: Optuna would write the next one behind it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
