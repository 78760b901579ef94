"""Dagster's history in Postgres, as deploy/ray configures it, on a server that this module starts on the loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from pipelines.__main__ import prepare
from pipelines.assets import chain
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from tests import tiny_workspace

ROOT = Path(__file__).parents[2]
ACCOUNT = {
    "POSTGRES_HOST": "127.0.0.1",
    "POSTGRES_USER": "of_the_test",
    "POSTGRES_PASSWORD": "secret-of-the-test",
    "POSTGRES_DB": "postgres",
}


def programs() -> Path:
    """The folder of initdb and postgres; Debian leaves it out of the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("Postgres is not installed: no initdb on the PATH or under /usr/lib/postgresql")
    return folders[-1]


def as_somebody() -> dict[str, Any]:
    """Whom the server runs as: Postgres refuses to run as root."""
    if os.getuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server with an empty database, which exists as long as this module's tests."""
    pytest.importorskip("dagster_postgres", reason="dagster-postgres is not installed; `make install` installs it")
    commands, somebody = programs(), as_somebody()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="personalize-postgres-") as name:  # pytest's are closed to other users
        folder = Path(name)
        (folder / "password").write_text(ACCOUNT["POSTGRES_PASSWORD"])
        if somebody:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody")
        create = [commands / "initdb", "-D", folder / "data", "-U", ACCOUNT["POSTGRES_USER"], "--no-sync"]
        create += ["--auth=scram-sha-256", "--pwfile", folder / "password", "--encoding=UTF8", "--locale=C"]
        subprocess.run(create, cwd=folder, check=True, capture_output=True, **somebody)
        serve = [commands / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(number)]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen([*serve, "-F"], cwd=folder, stdout=log, stderr=log, **somebody)
        try:
            wait_until_it_answers(server, number, folder / "log")
            yield number
        finally:
            server.send_signal(signal.SIGINT)  # Postgres' fast shutdown
            server.wait(60)


def wait_until_it_answers(server: subprocess.Popen[Any], port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < until:
        try:
            connection(port).close()
            return
        except pytest.importorskip("psycopg2").OperationalError:
            time.sleep(0.1)
    pytest.fail(f"Postgres does not answer: {log.read_text()[-2000:]}")


def connection(port: int) -> Any:
    """Without Dagster."""
    names = {"host": "HOST", "user": "USER", "password": "PASSWORD", "dbname": "DB"}
    account = {name: ACCOUNT[f"POSTGRES_{of}"] for name, of in names.items()}
    return pytest.importorskip("psycopg2").connect(port=port, **account)


@pytest.fixture(scope="module")
def workspace(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny workspace, current folder and DAGSTER_HOME, with the storage of deploy/ray/dagster.yaml on this port."""
    root = tmp_path_factory.mktemp("workspace")
    tiny_workspace.make(root)
    settings = yaml.safe_load((ROOT / "deploy" / "ray" / "dagster.yaml").read_text())
    settings["storage"]["postgres"]["postgres_db"]["port"] = port
    del settings["run_launcher"]  # Ray's
    (root / "dagster.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DAGSTER_HOME", str(root))
        for name, value in ACCOUNT.items():
            patch.setenv(name, value)
        yield root


def verdict_of(record: Any) -> bool:
    return record.event.dagster_event.asset_check_evaluation_data.passed


@pytest.mark.slow
def test_what_one_process_writes_to_postgres_another_reads(workspace, port):
    prepare(gpus=3)
    with dg.DagsterInstance.get() as instance:
        done = defs.resolve_job_def("prepare").execute_in_process(instance=instance, partition_key="rex")
        assert done.success

    assert not (workspace / ".dagster" / "storage").exists()  # nothing went to SQLite
    with dg.DagsterInstance.get() as another:
        assert type(another.event_log_storage).__name__ == "PostgresEventLogStorage"
        (run,) = another.get_runs()
        assert (run.run_id, run.status) == (done.run_id, dg.DagsterRunStatus.SUCCESS)
        assert sorted(another.get_dynamic_partitions(CONCEPT)) == ["cup", "rex"]
        for asset in (chain.latents, chain.class_images, chain.reference_scores):
            assert another.get_materialized_partitions(asset.key) == {"rex"}
        keys = [*chain.latents.check_keys, *chain.reference_scores.check_keys]
        found = another.event_log_storage.get_latest_asset_check_execution_by_key(keys)
        verdicts = {key.name: verdict_of(record) for key, record in found.items()}
        assert len(found) == 4
        assert verdicts == {
            "latents_finite": True,
            "latents_decode": False,  # the tiny base model's random autoencoder decodes nothing; that warns
            "scores_in_range": True,
            "scores_complete": True,
        }
        assert another.event_log_storage.get_concurrency_info("gpu").slot_count == 3

    with connection(port) as database, database.cursor() as cursor:
        cursor.execute("SELECT run_id, status FROM runs")
        assert cursor.fetchall() == [(done.run_id, "SUCCESS")]
        cursor.execute("SELECT partition FROM dynamic_partitions ORDER BY partition")
        assert cursor.fetchall() == [("cup",), ("rex",)]
