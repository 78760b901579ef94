"""Whether there is time for another trial: decided by what was measured and journalled, never by a clock.

So the decision is the same whenever it is asked for: a search that has ended starts nothing when it is run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from personalize_core.errors import InputError
from personalize_core.methods.recipe import Range
from personalize_core.tuning.measuring import Seconds
from personalize_core.tuning.search import Trial, best_of, spent_on
from personalize_core.tuning.space import Changes, with_changes


@dataclass(frozen=True)
class Budget:
    """Seconds of the device for the trials and for the repeats of today's recipe and of the best."""

    seconds: float
    repeats: int  # of each of the two
    recipe: Any  # today's
    space: Mapping[str, Range]

    def expected(self, today: Seconds, changes: Changes) -> Seconds:
        """What a recipe will take, by what today's took: training takes as long as it has steps."""
        return today.trained_longer(with_changes(self.recipe, changes).training_steps / self.recipe.training_steps)

    def costliest(self, today: Seconds) -> Seconds:
        """What the longest training of the space would take."""
        longest = {name: within.high for name, within in self.space.items() if name.endswith("steps")}
        return self.expected(today, longest)

    def least(self, today: Seconds) -> float:
        """Seconds of two trials with their repeats, whatever the second is."""
        return (1 + self.repeats) * (today.all + self.costliest(today).all)

    def has_room_for(self, changes: Changes, ended: Sequence[Trial]) -> bool:
        """Is there time for this trial, and then for the repeats? The first, today's recipe, is always tried."""
        if not ended:
            return True
        today = ended[0].seconds
        candidate = self.expected(today, changes).all
        best = best_of(ended)  # it or the candidate is repeated; today's recipe, where it is the best, is not
        dearest = max(candidate, self.expected(today, best.changes).all if best.number else 0.0)
        return spent_on(ended).all + candidate + self.repeats * (today.all + dearest) <= self.seconds

    def within(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of a search with this budget or a larger one up to the first that this budget has no room for."""
        return list(takewhile(lambda trial: self.has_room_for(trial.changes, trials[: trial.number]), trials))

    def check(self, today: Seconds, measured: str) -> None:
        """Raise InputError if the budget is too small for two trials.

        measured: how the seconds are known.
        """
        if self.least(today) > self.seconds:
            raise InputError(
                f"{minutes(self.seconds)} are too few for two trials: one of today's recipe takes "
                f"{minutes(today.all)} ({measured}), the longest that may be tried "
                f"{minutes(self.costliest(today).all)}, and both are trained {1 + self.repeats} times; the least that "
                f"would do is --minutes {rounded_up(self.least(today) / 60)}"
            )

    def likely_trials(self, today: Seconds) -> int:
        """About how many trials fit, today's among them, if the others take as long as it does."""
        return int((self.seconds - 2 * self.repeats * today.all) // today.all)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def rounded_up(value: float) -> str:
    """To a tenth, upwards, so that what it says does."""
    return f"{-(-value * 10 // 1) / 10:g}"
