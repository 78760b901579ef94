"""Whether the recipe that a search found is better than today's, by more than the noise of training.

The best of many trials is the best partly by luck, so the trial that chose it may not also judge it: both recipes are
trained again with other seeds, and only those trainings count for the gain. The noise is the variance between
trainings of one recipe on one concept, pooled over both recipes and all concepts: with C concepts and S seeds it has
2 C (S - 1) degrees of freedom. The gain, a mean over C (S - 1) pairs of trainings, has a standard error of
s sqrt(2 / (C (S - 1))); t times that (95 %, two-sided) is the least gain that is beyond the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from personalize_core.metrics.statistics import LEVEL, Noise


@dataclass(frozen=True)
class Verdict:
    """On the concepts that were tuned on."""

    gain: float  # mean balance of the found recipe less today's, over the trainings that chose nothing
    least: float  # the gain that would be beyond the noise
    between: float  # standard deviation between trainings of one recipe on one concept
    freedom: int  # degrees of freedom of that
    is_better: bool

    def noise_of_mean(self, concepts: int) -> float:
        """Standard deviation that another training seed gives a recipe's mean over so many concepts."""
        return self.between / concepts**0.5

    def noise_of_difference(self, concepts: int) -> Noise:
        """Of the difference of two recipes, each trained once on so many concepts."""
        return Noise(2 * self.between**2 / concepts, self.freedom)


def judge(today: np.ndarray, found: np.ndarray) -> Verdict:
    """Compare two recipes.

    Args:
        today, found: (concepts, seeds) balances; seed 0 is the one that the search went by.
    """
    from scipy import special

    concepts, seeds = today.shape
    freedom = 2 * concepts * (seeds - 1)
    between = float(np.sqrt((today.var(axis=1, ddof=1).mean() + found.var(axis=1, ddof=1).mean()) / 2))
    gain = float((found[:, 1:] - today[:, 1:]).mean())
    error = between * (2 / (concepts * (seeds - 1))) ** 0.5
    least = float(special.stdtrit(freedom, 1 - LEVEL / 2)) * error
    return Verdict(gain, least, between, freedom, gain > least)
