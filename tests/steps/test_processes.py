"""Tasks are shared out among processes, come back in their order, and leave what one process leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.steps.events import Event, unheard
from personalize_core.steps.processes import in_turn, shared_out
from personalize_core.workspace.failures import diagnose
from personalize_core.workspace.recipes import processes_of
from personalize_core.workspace.store import OWN_DEVICE
from tests import tiny_workspace
from tests.steps.tasks import ended, held, marked, told, wrong
from tests.steps.test_steps import bytes_under

ROOT = Path(__file__).parents[2]


def test_tasks_run_beside_each_other_are_heard_and_come_back_in_their_order(tmp_path):
    heard: list[Event] = []
    for pair in range(2):
        os.mkfifo(tmp_path / str(pair))
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
def test_who_stops_at_a_mistake_lets_no_later_task_begin(processes, tmp_path, monkeypatch):
    """Those that had begun end only after the others were called off, so none of these can slip in by being quick."""
    go, opened = tmp_path / "go", []
    os.mkfifo(go)
    call_off = ProcessPoolExecutor.shutdown

    def shutdown(pool: ProcessPoolExecutor, *arguments: Any, **options: Any) -> None:
        call_off(pool, *arguments, **options)
        opened.append(os.open(go, os.O_RDWR))

    if processes > 1:
        monkeypatch.setattr(ProcessPoolExecutor, "shutdown", shutdown)
    later = [partial(held, tmp_path / str(number), go) for number in range(20)]
    sharing: Any = shared_out([wrong, *later], processes, unheard)
    with pytest.raises(InputError):
        next(sharing)()
    sharing.close()
    for descriptor in opened:
        os.close(descriptor)
    assert bool(opened) == (processes > 1)
    assert not (tmp_path / "19").exists()


def test_a_process_that_is_ended_from_outside_is_told_of_with_what_to_do():
    with pytest.raises(ChildProcessError, match="ended from outside.*--processes 1") as raised:
        [done() for done in shared_out([ended, ended], 2, unheard)]
    diagnosis = diagnose(raised.value)
    assert diagnosis and diagnosis.passes


def test_processes_end_with_a_program_that_is_killed(tmp_path):
    """They hold its standard output open, which therefore ends when the last of them does."""
    program = """
        from personalize_core.steps.processes import shared_out
        from tests.steps.tasks import forever
        if __name__ == "__main__":
            list(shared_out([forever] * 2, 2, lambda event: print(event.what, flush=True)))
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert [parent.stdout.readline() for _ in range(2)] == ["it works\n"] * 2
        parent.kill()
        assert parent.stdout.read() == ""


@pytest.mark.slow
def test_two_processes_leave_the_bytes_that_one_leaves(tmp_path, monkeypatch, real_loss_curve):
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
    assert processes_of(mini, 2) == 2
    monkeypatch.setattr("personalize_core.workspace.recipes.device_of", lambda store: "cuda")
    assert processes_of(mini) == processes_of(mini, 1) == 1
    with pytest.raises(InputError, match="--processes 2 would compute on one graphics card in 2 processes at once"):
        processes_of(mini, 2)
