"""`make ui` as a service manager starts it: guarded, and gone within ten seconds of a signal, also during a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from personalize_core.workspace.store import Store
from pipelines.automation import recovery
from pipelines.resources import Workspace
from tests import tiny_workspace

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

LAUNCH = """mutation ($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p)
{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


class Ui:
    """The program, started with SIGINT ignored as a shell starts what stands before an &."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "pipelines", "ui", "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.said += self.process.stdout

    def wait_for(self, what: Callable[[], object]) -> None:
        """Until it is there, or the program has ended."""
        while not what():
            assert self.process.poll() is None, "".join(self.said)
            time.sleep(0.1)

    def serves(self) -> bool:
        try:
            return bool(self.ask("{ version }"))
        except OSError:
            return False

    def ask(self, query: str, host: str = "127.0.0.1", **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json", "Host": host}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["data"]

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def end(self, number: int) -> float:
        """Seconds until it had ended."""
        begun = time.monotonic()
        self.process.send_signal(number)
        assert self.process.wait(30) == 0
        self.reader.join()
        return time.monotonic() - begun


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_workspace.make(tmp_path)
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def ui(root: Path) -> Iterator[Ui]:
    started = Ui(root)
    yield started
    if started.process.poll() is None:
        started.end(signal.SIGTERM)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_ten_seconds_and_a_run_in_progress_can_be_resumed(number, root, ui, monkeypatch):
    """The run waits for a lock that this test holds, so that it is in progress when the signal comes."""
    ui.wait_for(ui.serves)
    with pytest.raises(urllib.error.HTTPError, match="403"):  # Dagster's command made the guarded server
        ui.ask("{ version }", host="evil.example")
    monkeypatch.chdir(root)
    with Store(root).device():
        selector = {
            "repositoryLocationName": "pipelines",
            "repositoryName": "__repository__",
            "pipelineName": "prepare",
        }
        tags = [{"key": "dagster/partition", "value": "rex"}]
        launched = ui.ask(LAUNCH, p={"selector": selector, "executionMetadata": {"tags": tags}, "mode": "default"})
        run_id = launched["launchPipelineExecution"]["run"]["runId"]
        locks = Workspace(root=str(root)).run_locks()
        ui.wait_for((locks / f"{run_id}.lock").exists)  # its process works on it
        family = ui.family()
        assert ui.end(number) < 10
    assert not [each for each in family if lives(each)]
    assert "temporary" not in "".join(ui.said)
    with dg.DagsterInstance.from_config(str(root)) as instance:
        (run,) = instance.get_runs(dg.RunsFilter(run_ids=[run_id]))
        assert run.status == dg.DagsterRunStatus.STARTED  # neither failed nor cancelled: what starts next finds it
        assert list(recovery.report_lost_runs(instance, locks)) == [run_id]
        (run,) = instance.get_runs(dg.RunsFilter(run_ids=[run_id]))
        assert run.tags["dagster/will_retry"] == "true"
