"""benchmarks/hostile_inputs tells each kind of failure from a right outcome."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hostile_inputs.runner import (
    ACCEPTED,
    CHANGED,
    CRASH,
    HANG,
    LEFTOVERS,
    MEMORY,
    REFUSED,
    TRACEBACK,
    WRONG,
    Case,
    Limits,
    Outcome,
    Right,
    idle_memory,
    run,
)
from personalize_core.errors import InputError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

NAMED = "input/photo.jpg cannot be read as an image"


@pytest.fixture(scope="module")
def fresh() -> Iterator[Executor]:
    """A process that has computed nothing, to fork from.

    What pytest's own has once held counts towards its forks where a fork inherits the peak of its parent, so that a
    fork could take as much unseen.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def accept(value: Any, folder: Path) -> Any:
    return value


def refuse(sentence: str, folder: Path) -> None:
    raise InputError(sentence)


def raise_key_error(folder: Path) -> None:
    raise KeyError("colour")


def loop(folder: Path) -> None:
    while True:
        time.sleep(0.01)


def grow(folder: Path) -> None:
    """For a shorter time than there is between two looks at it."""
    held = bytearray(b"x" * 300_000_000)
    del held


def grow_and_wait(folder: Path) -> None:
    held = bytearray(b"x" * 300_000_000)
    time.sleep(60)
    del held


def grow_elsewhere(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import time; x = b'x' * 300_000_000; time.sleep(60)"], check=True)


def kill_itself(folder: Path) -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(folder: Path) -> None:
    os._exit(0)


def leave_with_exit(folder: Path) -> None:
    sys.exit()


def remove_input(folder: Path) -> None:
    (folder / "input" / "photo.jpg").unlink()


def change_input(folder: Path) -> None:
    (folder / "input" / "photo.jpg").write_bytes(b"photO")


def leave_temporary(folder: Path) -> None:
    (folder / "made").mkdir()
    (folder / "made" / ".rex.01234567.99.01234567.tmp").touch()


def leave_in_the_systems_folder(folder: Path) -> None:
    tempfile.mkstemp()


def refuse_half_way(folder: Path) -> None:
    (folder / "made").mkdir()
    (folder / "made" / "0.png").touch()
    raise InputError(NAMED)


@pytest.mark.parametrize(
    ("read", "right", "found"),
    [
        (partial(accept, 7), "accepted", ACCEPTED),
        (partial(accept, 7), "either", ACCEPTED),
        (partial(refuse, NAMED), "refused", REFUSED),
        (partial(refuse, NAMED), "either", REFUSED),
        (partial(accept, 7), "refused", WRONG),
        (partial(accept, 8), "accepted", WRONG),
        (partial(accept, 8), "either", WRONG),
        (partial(accept, "x"), "accepted", WRONG),  # which the predicate cannot even look at
        (partial(refuse, NAMED), "accepted", WRONG),
        (partial(refuse, "something is wrong somewhere"), "refused", WRONG),
        (partial(refuse, NAMED + "x" * 4000), "refused", WRONG),
        (raise_key_error, "either", TRACEBACK),
        (leave_with_exit, "either", TRACEBACK),
        (loop, "either", HANG),
        (grow, "either", MEMORY),
        (grow_and_wait, "either", MEMORY),
        (grow_elsewhere, "either", MEMORY),
        (kill_itself, "either", CRASH),
        (leave, "either", CRASH),
        (remove_input, "either", CHANGED),
        (change_input, "either", CHANGED),
        (leave_temporary, "either", LEFTOVERS),
        (leave_in_the_systems_folder, "either", LEFTOVERS),
        (refuse_half_way, "either", LEFTOVERS),
    ],
)
def test_every_kind_of_failure_is_told_from_a_right_outcome(read, right, found, tmp_path, fresh):
    limits = Limits(0.5 if found == HANG else 30, 150_000_000)
    outcome = fresh.submit(outcome_of, read, right, tmp_path / "case", limits).result()
    assert outcome.found == found, outcome.what
    assert (outcome.memory > limits.memory) == (found == MEMORY) and outcome.seconds < 20
    assert not (tmp_path / "case").exists()


def outcome_of(read: Callable[[Path], Any], right: Right, folder: Path, limits: Limits) -> Outcome:
    case = Case("one", give_photo, read, right, is_seven, ("photo.jpg",), made=("made",))
    return run(case, folder, replace(limits, idle=idle_memory()))


def give_photo(folder: Path) -> None:
    (folder / "input").mkdir()
    (folder / "input" / "photo.jpg").write_bytes(b"photo")


def is_seven(value: Any) -> bool:
    return value + 0 == 7


def test_what_a_fifo_or_a_link_was_is_known_afterwards_without_opening_it(tmp_path):
    def give(folder: Path) -> None:
        (folder / "input").mkdir()
        os.mkfifo(folder / "input" / "fifo")
        os.symlink("/dev/zero", folder / "input" / "zeros")

    def change_link(folder: Path) -> None:
        (folder / "input" / "zeros").unlink()
        os.symlink("/dev/null", folder / "input" / "zeros")

    limits = Limits(30, 10**9, idle_memory())
    for read, found in ((partial(accept, 7), ACCEPTED), (change_link, CHANGED)):
        assert run(Case("one", give, read, "either"), tmp_path / "case", limits).found == found
