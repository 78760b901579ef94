"""What is done in the background is done in order, one thing at a time, and what fails is heard of."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from personalize_core.files.background import Background


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_the_caller_goes_on_meanwhile_and_the_next_thing_waits_for_the_one_before():
    go_on, seen = threading.Event(), []

    def first() -> None:
        go_on.wait()
        seen.append("first")

    with Background() as background:
        background.do(first)
        assert background.busy and seen == []
        releasing = threading.Thread(target=go_on.set)
        releasing.start()
        background.do(lambda: seen.append("second"))  # returns once the first is done
        assert seen[0] == "first"
        releasing.join()
    assert seen == ["first", "second"] and not background.busy


def test_everything_is_done_at_the_end_of_the_block():
    done = []
    with Background() as background:
        for number in range(20):
            background.do(lambda number=number: done.append((number, threading.current_thread())))
    assert [number for number, _ in done] == list(range(20))
    assert all(thread is not threading.main_thread() for _, thread in done)


def test_what_fails_is_raised_once_in_the_caller_by_the_next_thing_or_the_end():
    background = Background()
    with pytest.raises(OSError, match="no space"), background:
        background.do(failing(OSError("no space")))
    background.wait()  # it is known by now
    done = []
    with pytest.raises(OSError, match="no space"):
        background.do(failing(OSError("no space")))
        background.do(lambda: done.append(1))
    assert done == []
    background.do(lambda: done.append(2))
    background.wait()
    assert done == [2]


def test_a_failure_is_known_without_giving_it_more_to_do():
    background, begun, fail = Background(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        fail.wait()
        raise ValueError("it is full")

    background.do(work)
    begun.wait()
    background.check()  # it is still at it
    fail.set()
    with pytest.raises(ValueError, match="it is full"):
        background.wait()
    background.check()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ArithmeticError])
def test_a_block_that_fails_is_left_once_the_last_thing_is_done_and_with_its_own_failure(interruption):
    go_on, done = threading.Event(), []

    def work() -> None:
        go_on.wait()
        done.append(1)
        raise OSError("not this one")

    with pytest.raises(interruption), Background() as background:
        background.do(work)
        go_on.set()
        raise interruption
    assert done == [1]
