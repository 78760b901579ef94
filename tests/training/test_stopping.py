"""When a training has learned enough: DVAR's rule, and a rule on the scores of probes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from personalize_core.training.stopping import best_of, gains_no_more, has_settled, is_better, losses_in_window


def test_a_loss_has_settled_when_its_last_values_vary_little_beside_all():
    falling = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1, 0.1]
    # the last three are equal: variance 0; of all: not 0
    assert has_settled(falling, window=3, threshold=0.15)
    # the last four have mean 0.125 and variance (0.075^2 + 3 0.025^2) / 4 = 0.001875; all: mean 0.4125
    variance = sum((value - 0.4125) ** 2 for value in falling) / 8
    assert has_settled(falling, 4, 0.001875 / variance + 1e-9)
    assert not has_settled(falling, 4, 0.001875 / variance - 1e-9)


@pytest.mark.parametrize(
    ("steps", "every", "losses"),
    [(200, 5, 12), (3000, 5, 180), (3000, 18, 50), (40, 5, 12)],  # 60 steps, 900 and 900; in 12 there are but two
)
def test_a_window_is_the_same_share_of_a_long_training_as_of_a_short_one(steps, every, losses):
    assert losses_in_window(0.3, steps, every) == losses


@pytest.mark.parametrize("losses", [[], [1.0, 0.5], [0.25] * 10])
def test_nothing_has_settled_that_is_shorter_than_the_window_or_never_moved(losses):
    assert not has_settled(losses, window=3, threshold=0.5)


def test_one_probe_is_better_where_a_paired_one_sided_t_test_says_so():
    generator = np.random.default_rng(0)
    for _ in range(200):
        before = generator.normal(size=5)
        after = before + generator.normal(0.7, 1, size=5)
        expected = stats.ttest_rel(after, before, alternative="greater").pvalue < 0.05
        assert is_better(after, before) == expected


def test_a_single_image_has_no_noise_to_compare_with():
    assert is_better(np.array([0.2]), np.array([0.1])) and not is_better(np.array([0.1]), np.array([0.2]))


def test_it_gains_no_more_when_none_of_the_last_is_better_than_the_best_before():
    level = [np.array([score, score + 0.01]) for score in (0.1, 0.5, 0.5, 0.49, 0.5)]
    assert gains_no_more(level, patience=3)
    assert not gains_no_more(level[:4], patience=3)  # of the last three one is better than the first
    assert not gains_no_more(level[:3], patience=3)  # there is nothing before them
    assert not gains_no_more([*level, np.array([0.8, 0.81])], patience=3)


def test_the_best_of_equals_is_the_earliest():
    assert best_of([np.array([0.1]), np.array([0.4]), np.array([0.4]), np.array([0.2])]) == 1
