"""A run that was cut off by a power cut is found, and its training goes on to the same artifact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from personalize_core import steps
from personalize_core.workspace.store import Store
from pipelines.assets import chain
from pipelines.automation import recovery
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace
from tests import tiny_workspace
from tests.in_dagster import materialize, passing

ROOT = Path(__file__).parents[2]
PAIR = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})

CUT_OFF = """
import os, signal, sys
from personalize_core.artifacts import proof
from personalize_core.files.background import Background
from personalize_core.steps import training
from pipelines.assets import chain
from tests.conftest import ThisProcess
from tests.pipelines.test_recovery import learn

training.TimedCheckpoints.due = lambda checkpoints: True  # one after every step,
Background.do = lambda background, write: write()  # which is there before the next
proof.FreshProcess = ThisProcess

def listening(context):
    def listen(event):
        if event.what.startswith("training") and event.done == 3:
            os.killpg(0, signal.SIGKILL)
    return listen

chain.logged = listening
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
        locks = Workspace(root=str(workspace)).run_locks()
        assert list(recovery.report_lost_runs(instance, locks)) == [run.run_id]
        (failed,) = instance.get_runs()
        assert failed.status == dg.DagsterRunStatus.FAILURE
        assert failed.tags["dagster/will_retry"] == "true"  # what Dagster's daemon goes by
        assert recovery.report_lost_runs(instance, locks) == {}

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "logged", lambda context: heard.append)
        assert learn(str(workspace)).success
    assert [event.done for event in heard if event.what.startswith("training")] == [3]  # of three
    artifact = Store(workspace).artifact("textual_inversion", "rex")
    resumed = bytes_under(artifact)
    shutil.rmtree(artifact)
    steps.train(Store(workspace), "rex", "textual_inversion")
    assert bytes_under(artifact) == resumed


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs"


HOLDER = """
import sys
from pathlib import Path
from pipelines import run_locks
run_locks.hold(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path, run_id: str) -> subprocess.Popen[str]:
    """A process that works on a run, until its input ends or it is killed."""
    command = [sys.executable, "-c", HOLDER, str(folder), run_id]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def started_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    return instance.create_run_for_job(defs.resolve_job_def("compare"), status=dg.DagsterRunStatus.STARTED)


def test_a_run_whose_process_lives_is_left_alone_and_one_whose_process_was_killed_is_not(folder):
    with dg.DagsterInstance.local_temp() as instance:
        runs = [started_run(instance) for _ in range(2)]
        lives, killed = (holder(folder, run.run_id) for run in runs)
        assert recovery.report_lost_runs(instance, folder) == {}
        killed.kill()
        killed.wait()
        lost = recovery.report_lost_runs(instance, folder)
        assert list(lost) == [runs[1].run_id] and f"process {killed.pid}" in lost[runs[1].run_id]
        statuses = {run.run_id: run.status for run in instance.get_runs()}
        assert statuses == {runs[0].run_id: dg.DagsterRunStatus.STARTED, runs[1].run_id: dg.DagsterRunStatus.FAILURE}
        lives.communicate()


def test_a_run_that_ended_leaves_no_file_behind_and_one_of_another_history_is_left_alone(folder):
    with dg.DagsterInstance.local_temp() as instance:
        run = started_run(instance)
        instance.report_run_canceled(run)
        for run_id in (run.run_id, "of-another-history"):
            holder(folder, run_id).communicate()
        assert recovery.report_lost_runs(instance, folder) == {}
        assert [path.stem for path in folder.iterdir()] == ["of-another-history"]


def test_the_process_of_a_run_holds_its_lock_and_only_that(tmp_path, instance, monkeypatch):
    """In the process of a run, as Dagster prepares it; another one cannot take the lock."""
    free = "from pathlib import Path; from pipelines import run_locks; import sys; "
    free += "print([name for name, _ in run_locks.without_process(Path(sys.argv[1]))])"
    asked = []

    def step(store, listener):
        command = [sys.executable, "-c", free, str(store.work("runs"))]
        asked.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())
        return steps.Report(stamp="s", skipped=False, seconds=1.0, path=tmp_path)

    monkeypatch.setattr(steps, "compare", step)
    monkeypatch.setattr(steps.result_checks, "comparison", passing("comparison"))
    done = [materialize(instance, tmp_path, [chain.comparison]) for _ in range(2)]
    assert asked == ["[]", f"['{done[0].run_id}']"]


def test_the_sensor_says_what_it_found(tmp_path):
    workspace = Workspace(root=str(tmp_path))
    with dg.DagsterInstance.local_temp() as instance:

        def look() -> str:
            with dg.build_sensor_context(instance=instance) as context:
                said = recovery.lost_runs_sensor(context, workspace=workspace)
            assert isinstance(said, dg.SkipReason)
            return said.skip_message or ""

        assert look() == "every started run has its process"
        holder(workspace.run_locks(), started_run(instance).run_id).communicate()
        assert look().startswith("1 runs were lost")
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.FAILURE]
