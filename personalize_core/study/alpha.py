"""Krippendorff's alpha for nominal ratings: 1 - observed / expected disagreement; 1 is agreement, 0 is chance.

Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: units need not have equally many ratings,
and a unit with fewer than two says nothing.
"""

from __future__ import annotations

import numpy as np


def krippendorff_alpha(counts: np.ndarray) -> float | None:
    """Alpha where every rating counts once.

    Args:
        counts: (units, values), how many raters gave each value to each unit.

    Returns:
        None where no unit has two ratings, or where all ratings are the same.
    """
    m = counts.sum(axis=1)  # ratings per unit
    return nominal_alpha((counts * (counts - 1)).sum(axis=1), m * (m - 1), counts)


def nominal_alpha(same: np.ndarray, both: np.ndarray, counts: np.ndarray) -> float | None:
    """Alpha where ratings have weights, as where raters were resampled.

    With weights of one, a unit's m ratings make m (m - 1) ordered pairs, and count as m.

    Args:
        same, both: (units,) weight of the ordered pairs of ratings by different raters that are equal, and of all.
        counts: (units, values) weight of the ratings of each value.

    Returns:
        None where no unit has two raters, or where all ratings are the same.
    """
    kept = both > 1e-12
    if not kept.any():
        return None
    of_unit = counts[kept].sum(axis=1)
    observed = (of_unit * (1 - same[kept] / both[kept])).sum()
    n_v = counts[kept].sum(axis=0)  # ratings of each value
    n = n_v.sum()
    expected = n * n - (n_v**2).sum()
    if expected <= 1e-12 * n * n:
        return None
    return float(1 - (n - 1) * observed / expected)
