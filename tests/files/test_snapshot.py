"""Within one look nothing is found out twice, and after it nothing is remembered."""

from __future__ import annotations

import pytest

from personalize_core.files.snapshot import memoized, snapshot


class Asked:
    """A function that counts how often it really is called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.ask = memoized(self._answer)

    def _answer(self, *what, **more) -> object:
        self.calls.append((what, more))
        if what == ("wrong",):
            raise ValueError("wrong")
        return object()


def test_within_a_look_the_same_question_has_one_result_and_another_question_its_own():
    asked = Asked()
    with snapshot():
        assert asked.ask(1, way="a") is asked.ask(1, way="a")
        assert len({id(asked.ask(1)), id(asked.ask(2)), id(asked.ask(1, way="b"))}) == 3
    assert len(asked.calls) == 4


def test_two_functions_of_the_same_arguments_keep_their_results_apart():
    one, other = Asked(), Asked()
    with snapshot():
        assert one.ask(1) is not other.ask(1)


def test_outside_of_a_look_and_in_the_next_one_everything_is_asked_again():
    asked = Asked()
    assert asked.ask(1) is not asked.ask(1)
    look = snapshot()(lambda: asked.ask(1))
    assert look() is not look()
    assert len(asked.calls) == 4


def test_a_look_within_a_look_starts_with_nothing_and_takes_nothing_from_the_outer_one():
    asked = Asked()
    with snapshot():
        first = asked.ask(1)
        with snapshot():
            assert asked.ask(1) is not first
        assert asked.ask(1) is first


def test_what_was_raised_is_not_kept_and_ends_the_look():
    asked = Asked()
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"), snapshot():
            asked.ask("wrong")
    assert asked.ask(1) is not asked.ask(1)
    assert len(asked.calls) == 4
