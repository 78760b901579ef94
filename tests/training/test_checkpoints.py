"""Checkpoints are written while training goes on: whole, one at a time, as seldom as asked; failures are heard of."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from personalize_core.training import checkpoints as module
from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.watcher import Watched
from tests.conftest import EVERY_STEP, equal_bits


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)

    def step(self) -> None:
        self.weight.grad = torch.ones(3)
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Copied, by the names of a checkpoint."""
        (moments,) = self.optimizer.state_dict()["state"].values()
        tensors = {"method.weight": self.weight.detach()} | {f"optimizer.0.{n}": t for n, t in moments.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def learner() -> Any:
    learner = Learner()
    learner.step()
    return learner


def on_disk(checkpoints: Checkpoints) -> tuple[dict[str, torch.Tensor], list[int]]:
    with safe_open(checkpoints.path, framework="pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}
        return tensors, json.loads(saved.metadata()["progress"])["position"]


def test_it_holds_what_was_there_when_it_was_saved_though_training_went_on_before_it_was_written(
    learner, tmp_path, monkeypatch
):
    go_on, save_tensors = threading.Event(), module.save_tensors

    def save_late(*arguments: Any) -> None:
        assert go_on.wait(timeout=60)
        save_tensors(*arguments)

    monkeypatch.setattr(module, "save_tensors", save_late)
    checkpoints, history = Checkpoints(tmp_path, "stamp"), [{"step": 0}]
    expected = learner.state()
    with checkpoints.writes:
        checkpoints.save((0, 1), learner, learner.optimizer, history, Watched())
        learner.step()
        history.append({"step": 1})
        assert not equal_bits(learner.state(), expected) and not checkpoints.path.exists()
        go_on.set()
    tensors, position = on_disk(checkpoints)
    assert equal_bits(tensors, expected) and position == [0, 1]
    assert checkpoints.load().history == [{"step": 0}]


def test_two_are_never_written_at_once(learner, tmp_path, monkeypatch):
    writing, most, save_tensors = [0], [0], module.save_tensors

    def counted(*arguments: Any) -> None:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        save_tensors(*arguments)
        writing[0] -= 1

    monkeypatch.setattr(module, "save_tensors", counted)
    checkpoints = Checkpoints(tmp_path, "stamp", **EVERY_STEP)
    with checkpoints.writes:
        for step in range(1, 10):
            assert checkpoints.due()
            checkpoints.save((0, step), learner, learner.optimizer, [], Watched())
            learner.step()
    assert most == [1] and on_disk(checkpoints)[1] == [0, 9]


def test_saving_takes_no_more_than_its_share_of_the_time_and_comes_no_more_often_than_asked(
    learner, tmp_path, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    begun, go_on, seconds = threading.Event(), threading.Event(), [0.0]

    def slow(*arguments: Any) -> None:
        begun.set()
        assert go_on.wait(timeout=60)
        now[0] += seconds[0]

    monkeypatch.setattr(module, "save_tensors", slow)
    checkpoints = Checkpoints(tmp_path, "stamp", every_seconds=60, share=0.02)

    def first_due() -> float:
        """Seconds from the beginning of the last until the next may begin."""
        began = checkpoints._began
        while not checkpoints.due():
            now[0] += 1
        return now[0] - began

    assert first_due() == 60
    for took, due in ((0.5, 60), (1.2, 60), (3.0, 150), (40.0, 2000)):
        seconds[0] = took
        checkpoints.save((0, 1), learner, learner.optimizer, [], Watched())
        begun.wait()
        now[0] += 500
        assert not checkpoints.due()  # however long one is being written, there is no second
        now[0] -= 500
        go_on.set()
        checkpoints.writes.wait()
        begun.clear()
        go_on.clear()
        assert first_due() == pytest.approx(due, abs=1)


def test_loading_starts_the_time_anew(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, "stamp", every_seconds=60)
    now[0] = 100.0  # the base model was loaded meanwhile
    checkpoints.load()
    now[0] = 159.0
    assert not checkpoints.due()
    now[0] = 160.0
    assert checkpoints.due()


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("then", ["due", "save", "load", "clear", "end"])
def test_a_full_disk_is_heard_of_by_what_comes_next(then, learner, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, "stamp", **EVERY_STEP)
    monkeypatch.setattr(module, "save_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"), checkpoints.writes:
        checkpoints.save((0, 1), learner, learner.optimizer, [], Watched())
        thread: Any = checkpoints.writes._thread
        thread.join()
        if then == "save":
            checkpoints.save((0, 2), learner, learner.optimizer, [], Watched())
        elif then != "end":
            getattr(checkpoints, then)()


KILLED = """
import sys
from pathlib import Path
import personalize_core, torch
from personalize_core.training.watcher import Watched
from personalize_core.files import atomic
from personalize_core.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import Learner

checkpoints, learner = Checkpoints(Path(sys.argv[1]), "stamp"), Learner()
learner.step()
checkpoints.save((0, 1), learner, learner.optimizer, [], Watched())
checkpoints.writes.wait()
learner.step()

import safetensors.torch
def half(tensors, path, **options):
    Path(path).write_bytes(b"half of it")
    print("writing", flush=True)
    sys.stdin.read()

safetensors.torch.save_file = half
checkpoints.save((0, 2), learner, learner.optimizer, [], Watched())
checkpoints.writes.wait()
"""


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(learner, tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert killed.stdout
    assert killed.stdout.readline() == b"writing\n"
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, "stamp")
    tensors, position = on_disk(checkpoints)
    assert position == [0, 1] and equal_bits(tensors, learner.state())
    checkpoints.save((0, 3), learner, learner.optimizer, [], Watched())  # which clears away what was left of the half
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
