"""Tasks are shared out among processes, come back in their order, and leave what one process leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.steps.events import Event, Listener, unheard
from personalize_core.steps.processes import in_turn, shared_out
from personalize_core.workspace.failures import diagnose
from personalize_core.workspace.recipes import processes_of
from personalize_core.workspace.store import OWN_DEVICE
from tests import tiny_workspace
from tests.steps.test_steps import bytes_under

ROOT = Path(__file__).parents[2]


def told(number: int, folder: Path, listener: Listener) -> int:
    """Ends when its neighbour has begun, so that it ends only beside another."""
    (folder / str(number)).touch()
    while not (folder / str(number ^ 1)).exists():  # for ever, should it run alone
        time.sleep(0.01)
    listener(Event(f"task {number}", number, 4, {"process": float(os.getpid())}))
    return number * 10 + int(os.environ[OWN_DEVICE])


def wrong(listener: Listener) -> None:
    raise InputError("the third is wrong")


def ended(listener: Listener) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def marked(path: Path, listener: Listener) -> None:
    path.touch()


def held(path: Path, go: Path, listener: Listener) -> None:
    """Begins, and says so until it may end."""
    path.touch()
    while not go.exists():
        listener(Event(path.name, 0, 1))
        time.sleep(0.01)


def test_tasks_run_beside_each_other_are_heard_and_come_back_in_their_order(tmp_path):
    heard: list[Event] = []
    tasks = [partial(told, number, tmp_path) for number in range(4)]
    assert [done() for done in shared_out(tasks, 2, heard.append)] == [1, 11, 21, 31]
    assert sorted(event.what for event in heard) == [f"task {number}" for number in range(4)]
    assert len({event.metrics["process"] for event in heard} - {os.getpid()}) == 2
    assert OWN_DEVICE not in os.environ


def test_what_one_task_raises_is_its_own(tmp_path):
    tasks = [partial(marked, tmp_path / "before"), wrong, partial(marked, tmp_path / "after")]
    first, second, third = shared_out(tasks, 2, unheard)
    first()
    third()
    with pytest.raises(InputError, match="the third is wrong"):
        second()
    assert (tmp_path / "before").exists() and (tmp_path / "after").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_who_stops_at_a_mistake_lets_no_later_task_begin(processes, tmp_path):
    """Those that had begun end only after the others were called off, so none of these can slip in by being quick."""
    go, stopping = tmp_path / "go", threading.Event()

    def heard(event: Event) -> None:
        if stopping.is_set():
            go.touch()

    later = [partial(held, tmp_path / str(number), go) for number in range(20)]
    sharing: Any = shared_out([wrong, *later], processes, heard)
    with pytest.raises(InputError):
        next(sharing)()
    stopping.set()
    sharing.close()
    assert not (tmp_path / "19").exists()


def test_a_process_that_is_ended_from_outside_is_told_of_with_what_to_do():
    with pytest.raises(ChildProcessError, match="ended from outside.*--processes 1") as raised:
        [done() for done in shared_out([ended, ended], 2, unheard)]
    diagnosis = diagnose(raised.value)
    assert diagnosis and diagnosis.passes


def test_processes_end_with_a_program_that_is_killed(tmp_path):
    program = """
        from functools import partial
        from pathlib import Path
        from personalize_core.steps.processes import shared_out
        from tests.steps.test_processes import forever
        import sys
        if __name__ == "__main__":
            list(shared_out([partial(forever, Path(sys.argv[1]))] * 2, 2, lambda event: None))
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    while len(working := list(tmp_path.glob("*.pid"))) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(lives(int(path.stem)) for path in working):  # for ever, should they not end with their program
        time.sleep(0.05)


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def forever(folder: Path, listener: Listener) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    signal.pause()


@pytest.mark.slow
def test_two_processes_leave_the_bytes_that_one_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: the tiny base model would else take all threads
    store = tiny_workspace.make(tmp_path)
    tasks = [
        partial(in_turn, (steps.train, steps.sample_grid, steps.score), store, *cell)
        for cell in [("rex", "textual_inversion"), ("cup", "base_model")]
    ]
    made = []
    for processes in (1, 2):
        reports = [report for done in shared_out(tasks, processes, unheard) for report in done()]
        assert [report.skipped for report in reports] == [False] * 6
        folders = [report.path if report.path.is_dir() else report.path.parent for report in reports]
        made.append([bytes_under(folder) for folder in folders])
        for folder in folders:
            shutil.rmtree(folder)
    assert all(made[0]) and made[0] == made[1]


def test_only_the_miniature_on_a_cpu_is_computed_in_several_processes_at_once(tmp_path, monkeypatch):
    tiny = tiny_workspace.make(tmp_path)
    assert processes_of(tiny) == 1  # it takes all threads
    mini = tiny_workspace.write_params(tmp_path, tiny_workspace.params(tmp_path) | {"base_model": "mini"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=7 * 2**30))
    assert processes_of(mini) == 3  # of 2 GiB each
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=2**30))
    assert processes_of(mini) == 1
    monkeypatch.setattr("personalize_core.workspace.recipes.device_of", lambda store: "cuda")
    assert processes_of(mini) == 1
