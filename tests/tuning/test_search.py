"""Which recipe is tried next, and which trial is given up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from personalize_core.errors import InputError
from personalize_core.methods.recipe import Range
from personalize_core.metrics.balance import Means
from personalize_core.tuning.measuring import Seconds
from personalize_core.tuning.search import COMPLETE, DIVERGED, MOST_SUGGESTIONS, PRUNED, Journal, Part, Trial, best_of

SPACE = {"steps": Range(25, 200), "lr": Range(1e-5, 1e-3)}
TODAY = {"steps": 100, "lr": 1e-4}


def trial(number, values, changes=None, state=COMPLETE):
    parts = [Part(f"c{index}", Means(value, value, value), Seconds(1, 2, 3)) for index, value in enumerate(values)]
    return Trial(number, changes or TODAY, parts, state)


def searched(path, count, quality, stop=None):
    """The trials of a search whose balance is a function of the recipe; the journal is opened anew for each."""
    made = []
    for _ in range(count):
        journal = Journal(path, SPACE)
        suggested = next(journal.suggestions(TODAY, seed=3))
        value = quality(suggested.changes)
        journal.add(trial(suggested.number, [value, value], suggested.changes))
        made.append(suggested.changes)
    return made


def near_ideal(changes):
    """Best at 60 steps and a rate of 5e-4."""
    return 1 - abs(changes["steps"] - 60) / 200 - abs(changes["lr"] - 5e-4) * 500


def test_the_first_trial_is_todays_recipe_and_all_lie_inside(tmp_path):
    made = searched(tmp_path / "journal", 12, near_ideal)
    assert made[0] == TODAY
    assert len({json.dumps(changes) for changes in made}) > 8
    for changes in made:
        assert isinstance(changes["steps"], int)
        assert all(within.low <= changes[name] <= within.high for name, within in SPACE.items())


def test_what_is_suggested_depends_on_the_ended_trials_and_the_seed_alone(tmp_path):
    searched(tmp_path / "a", 7, near_ideal)
    journal = Journal(tmp_path / "a", SPACE)
    again = [next(journal.suggestions(TODAY, seed=3)).changes for _ in range(3)]
    assert again == [again[0]] * 3  # asked again after a kill, it is the same
    assert next(journal.suggestions(TODAY, seed=4)).changes != again[0]
    assert searched(tmp_path / "b", 8, near_ideal)[7] == again[0]  # and in another process, the same once more


def test_there_are_other_suggestions_for_where_the_first_takes_too_long(tmp_path):
    (alone,) = Journal(tmp_path / "journal", SPACE).suggestions(TODAY, seed=3)
    assert alone.changes == TODAY  # it is always tried
    searched(tmp_path / "journal", 6, near_ideal)
    journal = Journal(tmp_path / "journal", SPACE)
    made = list(journal.suggestions(TODAY, seed=3))
    assert len({json.dumps(each.changes) for each in made}) == MOST_SUGGESTIONS
    assert {each.number for each in made} == {6}
    assert min(each.changes["steps"] for each in made) < made[0].changes["steps"]
    again = Journal(tmp_path / "journal", SPACE).suggestions(TODAY, seed=3)
    assert [each.changes for each in again] == [each.changes for each in made]
    assert len(journal.trials) == 6  # what was only suggested is no trial


def test_it_learns_from_what_was_tried(tmp_path):
    """After the random trials the sampler looks where the balance was high."""
    made = searched(tmp_path / "journal", 30, near_ideal)
    early, late = (sum(map(near_ideal, some)) / len(some) for some in (made[1:5], made[-10:]))
    assert late > early + 0.05


def test_a_trial_is_read_as_it_was_written(tmp_path):
    written = [
        trial(0, [0.5, 0.25]),
        trial(1, [0.5], {"steps": 30, "lr": 2e-4}, PRUNED),
        Trial(2, {"steps": 40, "lr": 1e-3}, [], DIVERGED, None, 7.5),
        Trial(3, TODAY, trial(0, [0.5, 0.7]).parts, COMPLETE, (0.1, 0.9)),
        Trial(4, TODAY, [], PRUNED, None, 2.5),
    ]
    journal = Journal(tmp_path / "journal", SPACE)
    for each in written:
        journal.add(each)
    read = Journal(tmp_path / "journal", SPACE).trials
    assert [each.balance for each in read] == [pytest.approx(value) for value in (0.375, 0.5, 0.0, 0.6)] + [None]
    assert read == written
    assert read[2].seconds.all == 7.5
    assert best_of(read).number == 3


def test_of_equal_trials_the_first_is_the_best():
    assert best_of([trial(0, [0.5]), trial(1, [0.5])]).number == 0


def test_half_a_line_at_the_end_of_the_journal_is_dropped(tmp_path):
    path = tmp_path / "journal"
    searched(path, 3, near_ideal)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"st')
    journal = Journal(path, SPACE)
    assert len(journal.trials) == 3 and path.read_bytes() == whole
    journal.add(trial(3, [0.1, 0.1]))
    assert len(Journal(path, SPACE).trials) == 4


def test_a_damaged_journal_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "journal"
    searched(path, 2, near_ideal)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"no json\n", b"[]\n", b"{}\n"):
        path.write_bytes(lines[0] + damaged + lines[1])
        with pytest.raises(InputError, match="journal is damaged .* remove it"):
            Journal(path, SPACE)


def test_a_lock_that_a_killed_process_left_keeps_nobody_waiting(tmp_path):
    path = tmp_path / "journal"
    searched(path, 1, near_ideal)
    (tmp_path / "journal.lock").symlink_to(path)  # as Optuna's own lock leaves it
    assert len(searched(path, 1, near_ideal)) == 1


def test_a_trial_below_the_median_of_the_complete_ones_is_hopeless(tmp_path):
    journal = Journal(tmp_path / "journal", SPACE)
    for number, first in enumerate((0.2, 0.6, 0.4)):
        journal.add(trial(number, [first, 0.9]))
    suggested = next(journal.suggestions(TODAY, seed=3))
    assert suggested.is_hopeless([0.39])  # the median after the first concept is 0.4
    assert not suggested.is_hopeless([0.41])
    # after the second it is 0.65: the median of the means of 0.9 and 0.2, 0.6 or 0.4
    assert not suggested.is_hopeless([0.41, 0.9])
    assert suggested.is_hopeless([0.7, 0.58])  # however well it began


def test_probes_are_compared_with_probes(tmp_path):
    """What they see lies elsewhere than what is scored in the end."""
    journal = Journal(tmp_path / "journal", SPACE)
    for number, seen in enumerate((0.1, 0.3, 0.2)):
        one = trial(number, [0.9, 0.9])
        journal.add(replace(one, parts=[replace(part, half_way=seen) for part in one.parts]))
    journal.add(trial(3, [0.9, 0.9]))  # it was not looked at, and counts for nothing here
    suggested = next(journal.suggestions(TODAY, seed=3))
    assert suggested.looks_hopeless([0.19]) and not suggested.looks_hopeless([0.21])
    assert suggested.looks_hopeless([0.21, 0.17]) and not suggested.looks_hopeless([0.19, 0.23])
    assert not suggested.looks_hopeless([None, 0.01])  # one training had no probe


def test_nothing_is_hopeless_before_three_trials_are_complete(tmp_path):
    journal = Journal(tmp_path / "journal", SPACE)
    for number in range(2):
        journal.add(trial(number, [0.9, 0.9]))
    journal.add(trial(2, [0.9], state=PRUNED))
    assert not next(journal.suggestions(TODAY, seed=3)).is_hopeless([0.01])
