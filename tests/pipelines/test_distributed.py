"""What runs on many machines is configuration: it names the launcher, and it agrees with itself and with the code."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml

from personalize_core.files.atomic import machine
from personalize_core.workspace import store
from personalize_core.workspace.store import Store

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Of an instance with the launcher of deploy/ray, and with a history in a temporary folder."""
    pytest.importorskip("dagster_ray")
    settings = yaml.safe_load((DEPLOY / "ray" / "dagster.yaml").read_text())
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"run_launcher": settings["run_launcher"]}))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "http://ray-head:8265")
    with dg.DagsterInstance.get() as instance:
        yield instance.run_launcher


def test_every_run_is_a_ray_job_with_a_card_of_its_own(launcher):
    assert type(launcher).__name__ == "RayRunLauncher"
    assert (launcher.address, launcher.num_gpus) == ("http://ray-head:8265", 1)
    assert launcher.runtime_env["env_vars"] == {store.OWN_DEVICE: "1"}
    assert launcher.supports_check_run_worker_health  # a lost worker is noticed


# Which device a process waits for


def held(workspace: Store) -> set[str]:
    with workspace.device():
        return {path.name for path in workspace.work("locks").glob("device*")}


def test_machines_that_share_a_workspace_compute_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workspace = Store(tmp_path)
    assert held(workspace) == {f"device+{machine()}+.lock"}
    monkeypatch.setattr(store, "machine", lambda: "another")
    assert held(workspace) == {f"device+{machine()}+.lock", "device+another+.lock"}


def test_processes_that_see_other_cards_compute_at_the_same_time(tmp_path, monkeypatch):
    workspace = Store(tmp_path)
    for cards in ("0", "1", "MIG-GPU-a/1/0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
        held(workspace)
    assert len(held(workspace)) == 3


@pytest.mark.parametrize(("own", "waits"), [("1", False), ("0", True), (None, True)])
def test_who_has_a_device_to_himself_waits_for_nobody(own, waits, tmp_path, monkeypatch):
    monkeypatch.setenv(store.OWN_DEVICE, own) if own else monkeypatch.delenv(store.OWN_DEVICE, raising=False)
    happened: queue.Queue[str] = queue.Queue()

    @contextmanager
    def aside():
        happened.put("waits")
        yield

    def compute() -> None:
        with Store(tmp_path).device():
            happened.put("computes")

    monkeypatch.setattr(store, "aside", aside)
    with Store(tmp_path).device():
        thread = threading.Thread(target=compute)
        thread.start()
        assert happened.get(timeout=60) == ("waits" if waits else "computes")
    thread.join(60)
    assert waits == (not happened.empty() and happened.get() == "computes")


# The files for Kubernetes


def documents() -> dict[tuple[str, str], dict]:
    """By kind and name."""
    found = [each for path in sorted(KUBERNETES.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def everywhere(of, key: str) -> list:
    """The values of that key, at any depth."""
    if isinstance(of, dict):
        return ([of[key]] if key in of else []) + [value for each in of.values() for value in everywhere(each, key)]
    return [value for each in of for value in everywhere(each, key)] if isinstance(of, list) else []


def test_the_files_for_kubernetes_name_only_what_is_among_them():
    every = documents()
    claims = {claim["claimName"] for each in every.values() for claim in everywhere(each, "persistentVolumeClaim")}
    secrets = {secret["name"] for each in every.values() for secret in everywhere(each, "secretRef")}
    configs = {config["name"] for each in every.values() for config in everywhere(each, "configMapRef")}
    assert claims and secrets and configs
    assert claims <= {name for kind, name in every if kind == "PersistentVolumeClaim"}
    assert secrets <= {name for kind, name in every if kind == "Secret"}
    assert configs <= {name for kind, name in every if kind == "ConfigMap"}
    images = {image for each in every.values() for image in everywhere(each, "image") if "postgres" not in image}
    assert len(images) == 1  # code, Ray's head and its workers must not differ


def test_the_pods_are_told_what_the_configuration_asks_the_environment_for():
    asked = set(everywhere(yaml.safe_load((DEPLOY / "ray" / "dagster.yaml").read_text()), "env"))
    every = documents()
    told = {*every["ConfigMap", "personalize"]["data"], *every["Secret", "postgres"]["stringData"]}
    assert asked == {"RAY_ADDRESS", "POSTGRES_HOST", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"} <= told


def test_every_pod_sees_the_workspace_at_the_same_place():
    """Paths stand in reports and in DVC's files; the code location is the workspace's folder."""
    mounts = [mount for each in documents().values() for mount in sum(everywhere(each, "volumeMounts"), [])]
    assert {mount["mountPath"] for mount in mounts if mount["name"] == "workspace"} == {"/workspace"}
