"""A run that was cut off by a power cut is found, and its training goes on to the same artifact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._core.launcher import DefaultRunLauncher
from dagster._core.test_utils import create_run_for_test

from personalize_core import steps
from personalize_core.workspace.store import Store
from pipelines import assets, recovery
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from tests import tiny_workspace

ROOT = Path(__file__).parents[2]
PAIR = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})

CUT_OFF = """
import os, signal, sys
from functools import partial
from personalize_core.artifacts import proof
from personalize_core.steps import training
from pipelines import assets
from tests.conftest import ThisProcess
from tests.pipelines.test_recovery import learn

training.TimedCheckpoints = partial(training.TimedCheckpoints, every_seconds=0)  # a checkpoint after every step
proof.FreshProcess = ThisProcess

def listening(context):
    def listen(event):
        if event.what.startswith("training") and event.done == 3:
            os.killpg(0, signal.SIGKILL)
    return listen

assets.logged = listening
learn(sys.argv[1])
"""


def instance_of(root: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(root))


def learn(root: str) -> dg.ExecuteInProcessResult:
    """One concept by one method, as a run of the pipeline; the current folder is the workspace."""
    with instance_of(Path(root)) as instance:
        return defs.resolve_job_def("learn").execute_in_process(instance=instance, partition_key=PAIR)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the instance that dagster.yaml describes, and a run that was killed with all around it in its third step."""
    root = tmp_path_factory.mktemp("workspace")
    store = tiny_workspace.make(root)
    steps.encode_images(store, "rex")
    shutil.copy(ROOT / "dagster.yaml", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with instance_of(root) as instance:
            instance.add_dynamic_partitions(CONCEPT, ["rex"])
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-c", CUT_OFF, str(root)]
        done = subprocess.run(command, cwd=root, env=environment, start_new_session=True)
        assert done.returncode == -signal.SIGKILL
        yield root


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_lost_its_process_is_found_and_trains_on_from_its_checkpoint(workspace):
    with instance_of(workspace) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED  # as a power cut leaves it
        assert list(recovery.report_lost_runs(instance)) == [run.run_id]
        (failed,) = instance.get_runs()
        assert failed.status == dg.DagsterRunStatus.FAILURE
        assert failed.tags["dagster/will_retry"] == "true"  # what Dagster's daemon goes by
        assert recovery.report_lost_runs(instance) == {}

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "logged", lambda context: heard.append)
        assert learn(str(workspace)).success
    assert [event.done for event in heard if event.what.startswith("training")] == [3]  # of three
    artifact = Store(workspace).artifact("textual_inversion", "rex")
    resumed = bytes_under(artifact)
    shutil.rmtree(artifact)
    steps.train(Store(workspace), "rex", "textual_inversion")
    assert bytes_under(artifact) == resumed


class Elsewhere(DefaultRunLauncher):
    """A launcher whose runs are on other machines, and which looks after them itself."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True


def test_runs_on_other_machines_are_left_to_their_launcher(monkeypatch):
    monkeypatch.setattr(recovery, "_lives", lambda *process: False)
    with dg.DagsterInstance.local_temp() as instance:
        run = create_run_for_test(instance, "learn", status=dg.DagsterRunStatus.STARTED)
        instance.report_engine_event("Started process for run (pid: 1).", run, EngineEventData.in_process(1))
        assert recovery.lost_runs(instance) == {run.run_id: 1}
        monkeypatch.setattr(type(instance), "run_launcher", Elsewhere())
        assert recovery.lost_runs(instance) == {}


def test_the_sensor_says_what_it_found(monkeypatch):
    monkeypatch.setattr(recovery, "_lives", lambda *process: False)
    with dg.DagsterInstance.local_temp() as instance:

        def look() -> str:
            with dg.build_sensor_context(instance=instance) as context:
                said = recovery.lost_runs_sensor(context)
            assert isinstance(said, dg.SkipReason)
            return said.skip_message or ""

        assert look() == "every started run has its process"
        run = create_run_for_test(instance, "learn", status=dg.DagsterRunStatus.STARTED)
        instance.report_engine_event("Started process for run (pid: 1).", run, EngineEventData.in_process(1))
        assert look().startswith("1 runs were lost")
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.FAILURE]


def test_a_run_whose_process_lives_is_left_alone():
    now = time.time()
    assert recovery._lives(os.getpid(), now)
    assert not recovery._lives(os.getpid(), now - 7 * 86400)  # another process had that number then
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its status is still to be read
        assert not recovery._lives(ended.pid, now + 1)
    assert not recovery._lives(ended.pid, now)
