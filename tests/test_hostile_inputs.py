"""benchmarks/hostile_inputs tells each kind of failure from a right outcome."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    idle_memory,
    run,
)
from personalize_core.errors import InputError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

NAMED = "input/photo.jpg cannot be read as an image"


def refuse(sentence: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        raise InputError(sentence)

    return read


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
        (lambda folder: 7, "accepted", ACCEPTED),
        (lambda folder: 7, "either", ACCEPTED),
        (refuse(NAMED), "refused", REFUSED),
        (refuse(NAMED), "either", REFUSED),
        (lambda folder: 7, "refused", WRONG),
        (lambda folder: 8, "accepted", WRONG),
        (lambda folder: 8, "either", WRONG),
        (lambda folder: "x", "accepted", WRONG),  # which the predicate cannot even look at
        (refuse(NAMED), "accepted", WRONG),
        (refuse("something is wrong somewhere"), "refused", WRONG),
        (refuse(NAMED + "x" * 4000), "refused", WRONG),
        (raise_key_error, "either", TRACEBACK),
        (sys.exit, "either", TRACEBACK),
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
def test_every_kind_of_failure_is_told_from_a_right_outcome(read, right, found, tmp_path):
    def give(folder: Path) -> None:
        (folder / "input").mkdir()
        (folder / "input" / "photo.jpg").write_bytes(b"photo")

    case = Case("one", give, read, right, lambda value: value + 0 == 7, ("photo.jpg",), made=("made",))
    limits = Limits(0.5 if found == HANG else 30, 150_000_000, idle_memory())
    outcome = run(case, tmp_path / "case", limits)
    assert outcome.found == found, outcome.what
    assert (outcome.memory > limits.memory) == (found == MEMORY) and outcome.seconds < 20
    assert not (tmp_path / "case").exists()


def test_what_a_fifo_or_a_link_was_is_known_afterwards_without_opening_it(tmp_path):
    def give(folder: Path) -> None:
        (folder / "input").mkdir()
        os.mkfifo(folder / "input" / "fifo")
        os.symlink("/dev/zero", folder / "input" / "zeros")

    def replace(folder: Path) -> None:
        (folder / "input" / "zeros").unlink()
        os.symlink("/dev/null", folder / "input" / "zeros")

    limits = Limits(30, 10**9, idle_memory())
    for read, found in ((lambda folder: 7, ACCEPTED), (replace, CHANGED)):
        assert run(Case("one", give, read, "either"), tmp_path / "case", limits).found == found
