"""Whether another trial fits, by hand: today's recipe has 100 steps and takes 10 s, 2 s of which are not training."""

from __future__ import annotations

import pytest

from personalize_core.errors import InputError
from personalize_core.methods.dreambooth.recipe import Config
from personalize_core.metrics.balance import Means
from personalize_core.tuning.budget import Budget, rounded_up
from personalize_core.tuning.measuring import Seconds
from personalize_core.tuning.search import COMPLETE, Part, Trial

RECIPE = Config(steps=100)
TODAY = Seconds(8, 1, 1)


def budget(seconds, repeats=1):
    return Budget(seconds, repeats, RECIPE, RECIPE.search_space())


def trial(number, steps, seconds, balance=0.5):
    part = Part("rex", Means(balance, balance, balance), Seconds(seconds - 2, 1, 1))
    return Trial(number, {"steps": steps, "lr": 1e-5}, [part], COMPLETE)


def test_training_takes_as_long_as_it_has_steps():
    assert budget(100).expected(TODAY, {"steps": 50, "lr": 1}) == Seconds(4, 1, 1)
    assert budget(100).costliest(TODAY) == Seconds(16, 1, 1)


def test_todays_recipe_is_always_tried():
    assert budget(0.001).has_room_for({"steps": 100, "lr": 1}, [])


@pytest.mark.parametrize(
    "steps, needs",
    # 10 s are spent; the candidate and its repeat; the repeat of today's recipe
    [(50, 10 + 6 + 6 + 10), (100, 10 + 10 + 10 + 10), (200, 10 + 18 + 18 + 10)],
)
def test_a_trial_fits_with_the_repeats_that_follow(steps, needs):
    changes = {"steps": steps, "lr": 1e-5}
    assert budget(needs).has_room_for(changes, [trial(0, 100, 10)])
    assert not budget(needs - 0.01).has_room_for(changes, [trial(0, 100, 10)])


@pytest.mark.parametrize(
    "balance, repeats",
    # it is the best so far, and may be repeated; it is not, and will never be
    [(0.6, 10 + 18), (0.4, 10 + 6)],
)
def test_the_best_so_far_or_the_candidate_is_repeated(balance, repeats):
    ended = [trial(0, 100, 10), trial(1, 200, 18, balance)]
    needs = 28 + 6 + repeats
    assert budget(needs).has_room_for({"steps": 50, "lr": 1e-5}, ended)
    assert not budget(needs - 0.01).has_room_for({"steps": 50, "lr": 1e-5}, ended)


def test_the_least_is_two_trials_with_their_repeats_whatever_the_second_is():
    assert budget(100).least(TODAY) == 2 * (10 + 18)
    assert budget(100, repeats=3).least(TODAY) == 4 * (10 + 18)
    budget(56).check(TODAY, "measured")
    assert budget(56).has_room_for({"steps": 200, "lr": 1e-5}, [trial(0, 100, 10)])


def test_too_small_a_budget_is_refused_with_the_least_that_would_do():
    with pytest.raises(InputError, match=r"55 s are too few .* 10 s \(measured\).* 18 s.* 2 times; .*--minutes 1$"):
        budget(55).check(TODAY, "measured")


def test_a_smaller_budget_counts_the_trials_up_to_the_first_that_it_has_no_room_for():
    ended = [trial(0, 100, 10), trial(1, 50, 6), trial(2, 50, 6), trial(3, 50, 6)]
    assert budget(1000).within(ended) == ended
    assert budget(10 + 6 + 6 + 10 + 6).within(ended) == ended[:3]  # 16 s spent, 6 s, 16 s of repeats
    assert budget(1).within(ended) == ended[:1]


def test_likely_trials_leave_room_for_the_repeats():
    assert budget(100).likely_trials(TODAY) == 8


def test_minutes_are_rounded_upwards():
    assert [rounded_up(value) for value in (0.92, 0.9, 3.01)] == ["1", "0.9", "3.1"]
