"""Whether a training has learned enough, from what was seen of it so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95  # one-sided


FEWEST = 12  # losses in a window: the variance of fewer says little


def losses_in_window(share: float, steps: int, every: int) -> int:
    """How many losses, one behind every so many steps, lie in a share of a stage's steps; `FEWEST` at least."""
    return max(FEWEST, round(share * steps / every))


def has_settled(losses: Sequence[float], window: int, threshold: float) -> bool:
    """DVAR: the variance of the last `window` losses is less than `threshold` of the variance of all.

    Voronov et al. 2023, arXiv:2302.04841; the losses are of inputs that stay the same.
    """
    if len(losses) < window:
        return False
    whole = float(np.var(losses))
    return whole > 0 and float(np.var(losses[-window:])) < threshold * whole


def is_better(one: np.ndarray, other: np.ndarray) -> bool:
    """Is the mean of `one` above that of `other` by more than what their images differ by?

    Both (images,), of the same prompts and noise: Student's t over the differences, one-sided, 95 %.
    """
    from scipy import stats

    differences = one - other
    mean = float(differences.mean())
    if mean <= 0 or len(differences) < 2:
        return mean > 0
    noise = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return mean > float(stats.t.ppf(CONFIDENCE, len(differences) - 1)) * noise


def gains_no_more(scores: Sequence[np.ndarray], patience: int) -> bool:
    """Was none of the last `patience` probes better than the best of those before them?"""
    if len(scores) <= patience:
        return False
    best = scores[best_of(scores[:-patience])]
    return not any(is_better(score, best) for score in scores[-patience:])


def best_of(scores: Sequence[np.ndarray]) -> int:
    """The place of the highest mean, the earliest of equals."""
    return int(np.argmax([score.mean() for score in scores]))
