"""When a recipe that was found is called better, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from personalize_core.tuning.winner import judge

# Two concepts, two seeds. Within a concept today's trainings differ by 0 and 0.02, the found recipe's by 0.02 and 0:
# variances 0, 0.0002, 0.0002 and 0, so pooled 0.0001 with 4 degrees of freedom; t is 2.776 (tables of Student's t).
TODAY = np.array([[0.50, 0.50], [0.40, 0.42]])
FOUND = np.array([[0.60, 0.58], [0.50, 0.50]])


def test_a_gain_beyond_the_noise_wins():
    verdict = judge(TODAY, FOUND)
    assert verdict.between == pytest.approx(0.01)
    assert verdict.freedom == 4
    assert verdict.gain == pytest.approx(0.08)  # the mean of 0.58 - 0.50 and 0.50 - 0.42: of the second seed alone
    assert verdict.least == pytest.approx(2.776 * 0.01 * np.sqrt(2 / 2), rel=1e-3)
    assert verdict.is_better


def test_a_gain_within_the_noise_does_not():
    verdict = judge(TODAY, FOUND - [[0, 0.06], [0, 0.06]])  # and what the seeds differ by is larger now
    assert verdict.gain == pytest.approx(0.02)
    assert not verdict.is_better


def test_the_training_that_chose_a_recipe_does_not_judge_it():
    lucky = TODAY + [[0.3, 0.0], [0.3, 0.0]]
    assert judge(TODAY, lucky).gain == pytest.approx(0.0)
    assert not judge(TODAY, lucky).is_better


def test_more_repeats_find_a_smaller_gain():
    generator = np.random.default_rng(0)
    today, found = (0.5 + gain + generator.normal(0, 0.02, (4, 6)) for gain in (0.0, 0.03))
    assert judge(today, found).least < judge(today[:, :2], found[:, :2]).least
    assert judge(today, found).freedom == 2 * 4 * 5


def test_two_recipes_alike_are_rarely_told_apart():
    """At most 5 % of the time, one way or the other; the seed that chose is the luckier of twenty."""
    generator = np.random.default_rng(1)
    said = 0
    for _ in range(2000):
        today = generator.normal(0, 1, (4, 2))
        tried = generator.normal(0, 1, (20, 4))
        chosen = tried[tried.mean(axis=1).argmax()]
        said += judge(today, np.stack([chosen, generator.normal(0, 1, 4)], axis=1)).is_better
    assert said / 2000 < 0.04  # 2.5 % on this side


def test_the_noise_of_a_mean_and_of_a_difference():
    verdict = judge(TODAY, FOUND)
    assert verdict.noise_of_mean(4) == pytest.approx(0.005)
    assert verdict.noise_of_difference(4).variance == pytest.approx(2 * 0.0001 / 4)
