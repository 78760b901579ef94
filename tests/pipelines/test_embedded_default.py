"""Out of the box: no server, no account, no environment variable, and all of Dagster's state in one folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny_workspace
from tests.pipelines.test_distributed import everywhere

ROOT = Path(__file__).parents[2]

RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import dagster as dg
from pipelines.__main__ import prepare
from pipelines.definitions import defs

prepare(gpus=1)
with dg.DagsterInstance.from_config(".") as instance:
    known = len(instance.get_runs())
    key = dg.MultiPartitionKey({{"concept": "rex", "method": "base_model"}})
    done = defs.resolve_job_def("learn").execute_in_process(instance=instance, partition_key=key)
    skipped = [event.materialization.metadata["skipped"].value for event in done.get_asset_materialization_events()]
    print(known, done.success, skipped)
"""


def listing(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_dagsters_settings_ask_the_environment_and_other_machines_for_nothing():
    settings = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert not everywhere(settings, "env") and not everywhere(settings, "hostname") and "run_launcher" not in settings
    folders = everywhere(settings, "base_dir")
    assert len(folders) == 3 and all(Path(folder).parts[0] == ".dagster" for folder in folders)


@pytest.mark.slow
def test_a_run_with_an_empty_environment_keeps_its_state_in_a_folder_that_may_be_deleted(tmp_path):
    tiny_workspace.make(tmp_path)
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    before = listing(tmp_path)

    def run() -> str:
        command = [sys.executable, "-W", "ignore", "-c", RUN]
        done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert run() == "0 True [False, False, False]"
    assert listing(tmp_path) - before == {".dagster"}
    assert run() == "1 True [True, True, True]"
    shutil.rmtree(tmp_path / ".dagster")
    assert run() == "0 True [True, True, True]"  # the history is gone, the results are not
