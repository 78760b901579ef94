"""The pipeline on a local Ray cluster: `python -m benchmarks.ray_cluster [--cells 4] [--cards 2]`.

Needs the extra `ray`.

The cluster is this machine alone, with a resource "card" in place of GPUs and the settings of deploy/ray with SQLite in
place of Postgres. Cells run as a backfill; then one cell whose training is long enough for a checkpoint, and which is
killed (signal 9) after it. The results must be, byte for byte, those of the core alone. The models are the tests' tiny
ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from benchmarks.kills import difference, finish, forked
from benchmarks.orchestration import ROOT, Dagster, load, runs_of, temporary_folder, wait_for
from personalize_core import steps
from personalize_core.workspace.store import Store
from tests import tiny_workspace

METHODS = ("textual_inversion", "dreambooth", "personalized_residuals", "base_model")
LONG = {"steps": 4000, "batch_size": 1}  # the first checkpoint comes after a minute
RAY = Path(sys.executable).with_name("ray")


def compared(store: Store, cells: list[tuple[str, str]]) -> dict[str, bytes]:
    """Artifacts, grids and tables."""
    folders = [
        place(method, concept) for concept, method in cells for place in (store.artifact, store.grid, store.scores)
    ]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(store.root).as_posix(): path.read_bytes() for path in paths}


def by_the_core(store: Store, cells: list[tuple[str, str]]) -> dict[str, bytes]:
    """The same cells by the core, in a process of its own, because the process must not compute before it forks."""

    def make() -> None:
        for concept, method in cells:
            for step in (steps.train, steps.sample_grid, steps.score):
                step(store, concept, method)

    finish(forked(make))
    expected = compared(store, cells)
    for name in ("artifacts", "grids", "metrics", "latents", "class_images", "costs"):
        shutil.rmtree(store.data / name, ignore_errors=True)
    return expected


def settings(root: Path) -> Path:
    """deploy/ray for one machine without GPU and Postgres."""
    described = yaml.safe_load((ROOT / "deploy" / "ray" / "dagster.yaml").read_text())
    described["storage"] = yaml.safe_load((ROOT / "dagster.yaml").read_text())["storage"]
    of_ray = described["run_launcher"]["config"]["ray"]
    del of_ray["num_gpus"]
    of_ray |= {"num_cpus": 1, "resources": {"card": 1}}
    of_ray["runtime_env"]["env_vars"]["PYTHONPATH"] = str(ROOT)
    home = root / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump(described))
    return home


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def cluster(dashboard: int, cards: int, folder: Path) -> Iterator[None]:
    """Ray's head and its workers; all of these processes end with the block, and no others."""
    start = [str(RAY), "start", "--head", "--block", "--port", str(free_port()), "--dashboard-port", str(dashboard)]
    start += ["--num-cpus", "8", "--resources", f'{{"card": {cards}}}', "--disable-usage-stats"]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(start, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    def answers() -> bool:
        with socket.socket() as probe:
            return head.poll() is None and probe.connect_ex(("127.0.0.1", dashboard)) == 0

    started: list[psutil.Process] = []
    try:
        wait_for(answers, 600)
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait()
        for process in psutil.wait_procs(started, timeout=30)[1]:
            process.kill()


def driver_of(run_id: str) -> psutil.Process | None:
    """The process that Ray started for a run."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "execute_run" in words and any(run_id in word for word in words):
            return process
    return None


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--cells", type=int, default=4)
    arguments.add_argument("--cards", type=int, default=2)
    chosen = arguments.parse_args()
    import dagster as dg

    with temporary_folder() as root:
        finish(forked(lambda: tiny_workspace.make(root) and None))
        store = Store(root)
        cells = [(concept, method) for concept in ("rex", "cup") for method in METHODS][: chosen.cells]
        expected = by_the_core(store, cells)
        shutil.copy(ROOT / "workspace.yaml", root)
        shutil.copy(ROOT / "dagster.yaml", root)
        port, home = free_port(), settings(root)
        os.environ["RAY_ADDRESS"] = f"http://127.0.0.1:{port}"
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Ray calls `dagster`
        os.environ["PYTHONPATH"] = str(ROOT)
        os.chdir(root)  # dagster.yaml's folders are relative to it
        with cluster(port, chosen.cards, root):
            with Dagster(root, home, chosen.cards) as ui, dg.DagsterInstance.from_config(str(home)) as instance:
                begun, backfill = time.monotonic(), ui.backfill(cells)

                def ended() -> bool:
                    records = runs_of(instance, backfill)
                    return len(records) == len(cells) and all(record.dagster_run.is_finished for record in records)

                wait_for(ended, 3600)
                seconds = time.monotonic() - begun
                wrong = difference(expected, compared(store, cells))
                print(
                    f"{len(cells)} cells as Ray jobs on {chosen.cards} cards in {seconds:.0f} s: "
                    f"{wrong or 'the same bytes as by the core alone'}; {load()}",
                    flush=True,
                )

                values = tiny_workspace.params(root)
                values["methods"]["textual_inversion"] = {values["base_model"]: LONG}
                store = tiny_workspace.write_params(root, values)
                cell = [("rex", "textual_inversion")]
                backfill = ui.backfill(cell)
                checkpoint = store.checkpoints("textual_inversion", "rex") / "checkpoint.safetensors"
                wait_for(checkpoint.is_file, 3600)
                (lost,) = runs_of(instance, backfill)
                process = driver_of(lost.dagster_run.run_id)
                assert process
                process.send_signal(signal.SIGKILL)
                begun = time.monotonic()

                def done_again() -> bool:
                    return any(record.dagster_run.is_success for record in runs_of(instance, backfill))

                wait_for(done_again, 3600)
                states = [record.dagster_run.status.value for record in runs_of(instance, backfill)]
                resumed = compared(store, cell)
                wrong = difference(by_the_core(store, cell), resumed)
                print(
                    f"a worker killed in mid-training: {states} after {time.monotonic() - begun:.0f} s; "
                    f"{wrong or 'the same bytes as of an undisturbed training'}; {load()}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
