"""What Dagster and DVC cost beside the work: `python -m benchmarks.orchestration WHAT [...]`, in the project's folder.

  direct [CELLS ...]   a cell (train, sample, score) by calling the core, and by Dagster in the same, warm process
  daemon [CELLS ...]   the same as a backfill through a real `dagster dev`: a queued run, a process for each cell
  together [METHODS]   stale cells of a concept: a run for each, and all in one run (the job learn_concept), in turn
  backfill             101 concepts x 10 methods: accepted, all queued, cancelled, resumed; and the GPU pool's limit
  arrival [CONCEPTS]   ticks of the sensor `concept_folder` over 10,000 concepts of 5 images, or so many
  dvc                  `dvc repro` over 101 concepts x 10 methods with nothing to do

But for `together`, every cell is done already, so that a run finds its three results current: what is measured is what
surrounds the work.
The models are the tests' tiny ones, the workspace is a temporary folder, the settings are those of dagster.yaml. What
was measured, and on which machine, stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch
from personalize_core.files.atomic import read_json, write_json
from personalize_core.methods import METHOD_NAMES, recipe_class
from personalize_core.workspace.stamps.training import TrainingInputs
from personalize_core.workspace.store import Store

ROOT = Path(__file__).parents[1]
CONCEPTS, METHODS = 101, METHOD_NAMES[:10]
LEARN = ("artifact", "image_grid", "metrics")


def concept_name(number: int) -> str:
    return f"c{number:03d}"


def cells_of(count: int) -> list[tuple[str, str]]:
    """The first so many of 101 x 10."""
    return [(concept_name(number // len(METHODS)), METHODS[number % len(METHODS)]) for number in range(count)]


# Workspaces


def workspace(root: Path, cells: int) -> Store:
    """101 concepts, of which the first cells are done. Each method trains once; its other artifacts are copies."""
    from personalize_core import steps
    from personalize_core.artifacts import proof
    from personalize_core.steps import training
    from tests import tiny_workspace
    from tests.conftest import ThisProcess

    store = tiny_workspace.make(root)
    values = tiny_workspace.params(root)
    values |= {
        "precision": "fp32",
        "gradient_checkpointing": False,
        "optimizer": "adamw",
    }  # dvc.yaml's stages name them
    values["sampling"]["images_per_prompt"] = 1
    values["methods"] = {name: {values["base_model"]: _short(name)} for name in METHODS}
    store = tiny_workspace.write_params(root, values)
    shutil.rmtree(store.concept_folder("cup"))
    for number in range(CONCEPTS):
        shutil.copytree(store.concept_folder("rex"), store.concept_folder(concept_name(number)))
        description = store.concept_folder(concept_name(number)) / "concept.yaml"
        description.write_text(description.read_text().replace("<rex>", f"<{concept_name(number)}>"))
    shutil.rmtree(store.concept_folder("rex"))

    train_into, trained = training._train_into, {}

    def copied(folder: Path, store: Store, inputs: TrainingInputs, *more: Any) -> dict[str, Any]:
        concept, method = inputs.concept.name, inputs.method
        if method not in trained:
            train_into(folder, store, inputs, *more)
            trained[method] = store.artifact(method, concept)
            return {}
        shutil.copytree(trained[method], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        about = read_json(folder / "config.json")
        write_json(folder / "config.json", json.loads(json.dumps(about).replace(trained[method].name, concept)))
        return {}

    proof.FreshProcess = ThisProcess
    training._train_into = copied
    for concept, method in cells_of(cells):
        for step in (steps.train, steps.sample_grid, steps.score):
            step(store, concept, method)
    training._train_into = train_into
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, root)
    return store


def _short(method: str) -> dict[str, Any]:
    recipe = recipe_class(method)()
    short = {name: 1 for name in vars(recipe) if name.endswith(("steps", "batch_size"))}
    return short | ({"class_images": 2} if recipe.class_images_needed else {})


# In one process


def direct(counts: Sequence[int]) -> None:
    import dagster as dg

    from personalize_core import steps
    from pipelines.__main__ import prepare
    from pipelines.definitions import defs

    with temporary_folder() as root:
        store, cells = workspace(root, max(counts)), cells_of(max(counts))
        os.chdir(root)
        prepare(1)
        job = defs.resolve_job_def("learn")

        def core(concept: str, method: str) -> None:
            assert all(step(store, concept, method).skipped for step in (steps.train, steps.sample_grid, steps.score))

        with dg.DagsterInstance.from_config(str(root)) as instance:

            def pipeline(concept: str, method: str) -> None:
                key = dg.MultiPartitionKey({"concept": concept, "method": method})
                assert job.execute_in_process(instance=instance, partition_key=key).success

            for each in (core, pipeline):
                each(*cells[0])  # imports, tables, a first look at every file
            for count in counts:
                (core_clock, core_own), (clock, own) = [per_cell(each, cells[:count]) for each in (core, pipeline)]
                print(
                    f"{count:5d} cells: {core_clock:.3f} s each by the core, {clock:.3f} s by Dagster in the same "
                    f"process: {clock - core_clock:.3f} s of overhead; of the process's own time "
                    f"{own - core_own:.3f} s; {load()}",
                    flush=True,
                )


def per_cell(do: Any, cells: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Seconds on the clock, and of the process's own, for the machine may be busy."""
    begun, own = time.perf_counter(), time.process_time()
    for cell in cells:
        do(*cell)
    return (time.perf_counter() - begun) / len(cells), (time.process_time() - own) / len(cells)


# Through the daemon


class Dagster:
    """`dagster dev` over a workspace, as `python -m pipelines ui` starts it, and its GraphQL."""

    def __init__(self, root: Path, home: Path | None = None, cards: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root, self.log = root, (root / "dagster.log").open("w")
        environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
        other = ["--home", str(home)] if home else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "ui", "--port", str(self.port), "--gpus", str(cards), *other],
            cwd=root,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Dagster:
        begun = time.monotonic()
        while time.monotonic() - begun < 300:
            if self.process.poll() is not None:
                break
            try:
                self.ask("{ version }")
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        sys.exit((self.root / "dagster.log").read_text()[-2000:])

    def __exit__(self, *failure: object) -> None:
        with_signals = (signal.SIGINT, signal.SIGKILL)
        for number in with_signals:
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self.log.close()

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        if "errors" in found:
            sys.exit(f"{found['errors']}")
        return found["data"]

    def backfill(self, cells: Sequence[tuple[str, str]]) -> str:
        parameters = {
            "assetSelection": [{"path": [name]} for name in LEARN],
            "partitionNames": [f"{concept}|{method}" for concept, method in cells],
        }
        return self._launched(parameters)

    def _launched(self, parameters: dict[str, Any]) -> str:
        found = self.ask(
            "mutation ($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) "
            "{ __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }",
            p=parameters,
        )["launchPartitionBackfill"]
        return _id_of(found)

    def learn_together(self, concepts: Sequence[str]) -> str:
        place = {"repositoryName": "__repository__", "repositoryLocationName": "pipelines"}
        parameters = {
            "selector": {"partitionSetName": "learn_concept_partition_set", "repositorySelector": place},
            "partitionNames": [*concepts],
        }
        return self._launched(parameters)

    def cancel(self, backfill: str) -> None:
        query = "mutation ($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"
        assert self.ask(query, id=backfill)["cancelPartitionBackfill"]["__typename"] == "CancelBackfillSuccess"

    def resume(self, backfill: str) -> str:
        """What is left of it: whatever has not been made."""
        query = (
            "mutation ($p: ReexecutionParams!) { reexecutePartitionBackfill(reexecutionParams: $p) "
            "{ __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"
        )
        found = self.ask(query, p={"parentRunId": backfill, "strategy": "FROM_FAILURE"})
        return _id_of(found["reexecutePartitionBackfill"])

    def status(self, backfill: str) -> str:
        query = (
            "query ($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"
        )
        return self.ask(query, id=backfill)["partitionBackfillOrError"]["status"]


def _id_of(found: dict[str, str]) -> str:
    if found["__typename"] != "LaunchBackfillSuccess":
        sys.exit(f"{found}")
    return found["backfillId"]


def runs_of(instance: Any, backfill: str) -> list[Any]:
    import dagster as dg

    return list(instance.get_run_records(dg.RunsFilter(tags={"dagster/backfill": backfill})))


def most_at_once(records: Sequence[Any]) -> int:
    """Of runs that hold the pool: from being taken out of the queue to their end."""
    changes = [(record.start_time, 1) for record in records if record.start_time]
    changes += [(record.end_time, -1) for record in records if record.start_time and record.end_time]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def wait_for_partitions(instance: Any) -> None:
    """Until the sensors have registered every concept, and no run of theirs is left."""
    import dagster as dg

    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTED])
    wait_for(lambda: len(instance.get_dynamic_partitions("concept")) == CONCEPTS, 600)
    wait_for(lambda: instance.get_runs_count(unfinished) == 0, 600)


def wait_for(what: Any, seconds: float, every: float = 1.0) -> float:
    begun = time.monotonic()
    while not what():
        if time.monotonic() - begun > seconds:
            sys.exit(f"nothing after {seconds:.0f} s")
        time.sleep(every)
    return time.monotonic() - begun


def daemon(counts: Sequence[int]) -> None:
    import dagster as dg

    with temporary_folder() as root:
        workspace(root, max(counts))
        os.chdir(root)  # dagster.yaml's folders are relative to it
        with Dagster(root) as ui, dg.DagsterInstance.from_config(str(root)) as instance:
            wait_for_partitions(instance)
            for count in counts:
                backfill = ui.backfill(cells_of(count))
                begun = time.monotonic()

                def ended(backfill: str = backfill, count: int = count) -> bool:
                    records = runs_of(instance, backfill)
                    return len(records) == count and all(record.dagster_run.is_finished for record in records)

                wait_for(ended, 60 + 60 * count)
                seconds, records = time.monotonic() - begun, runs_of(instance, backfill)
                assert all(record.dagster_run.is_success for record in records)
                launched = [instance.get_run_stats(record.dagster_run.run_id).launch_time for record in records]
                lasted = [record.end_time - began for record, began in zip(records, launched, strict=True)]
                steps = [_seconds_in_steps(instance, record.dagster_run.run_id) for record in records]
                overhead = [whole - inside for whole, inside in zip(lasted, steps, strict=True)]
                print(
                    f"{count:5d} cells: a run takes {statistics.median(lasted):.1f} s from leaving the queue to its "
                    f"end (median; longest {max(lasted):.1f}), of which {statistics.median(steps):.1f} s are in the "
                    f"core and its imports: {statistics.median(overhead):.1f} s of overhead; all within "
                    f"{seconds:.0f} s, {seconds / count:.1f} s each; at most {most_at_once(records)} at once; {load()}",
                    flush=True,
                )


def together(count: int) -> None:
    """Of the first so many methods, on concepts that nothing has been trained on, in two rounds."""
    import dagster as dg

    from personalize_core import steps

    with temporary_folder() as root:
        store = workspace(root, 0)
        concepts, methods = [concept_name(number) for number in range(4)], METHODS[:count]
        values = yaml.safe_load((root / "params.yaml").read_text())
        values["methods"] = {name: values["methods"][name] for name in methods}
        (root / "params.yaml").write_text(yaml.safe_dump(values))
        for concept in concepts:
            steps.encode_images(store, concept)
        steps.make_class_images(store, store.concept(concepts[0]).class_noun)
        os.chdir(root)
        with Dagster(root) as ui, dg.DagsterInstance.from_config(str(root)) as instance:
            wait_for_partitions(instance)

            def seconds(backfill: str, runs: int) -> float:
                """From when the first run left the queue to the end of the last."""

                def ended() -> bool:
                    records = runs_of(instance, backfill)
                    return len(records) == runs and all(record.dagster_run.is_finished for record in records)

                wait_for(ended, 3600)
                records = runs_of(instance, backfill)
                assert all(record.dagster_run.is_success for record in records)
                launched = [instance.get_run_stats(record.dagster_run.run_id).launch_time for record in records]
                return max(record.end_time for record in records) - min(launched)

            for one, other in (concepts[:2], concepts[2:]):
                apart = seconds(ui.backfill([(one, method) for method in methods]), count)
                in_one = seconds(ui.learn_together([other]), 1)
                print(
                    f"{count} cells: {apart:.0f} s in a run for each, {in_one:.0f} s in one run; "
                    f"{3600 * count / apart:.0f} and {3600 * count / in_one:.0f} cells per hour, "
                    f"{apart / in_one:.1f} times as many; {load()}",
                    flush=True,
                )


def _seconds_in_steps(instance: Any, run_id: str) -> float:
    statistics_of_steps = instance.get_run_step_stats(run_id)
    return sum(each.end_time - each.start_time for each in statistics_of_steps if each.end_time and each.start_time)


def backfill() -> None:
    import dagster as dg

    every = cells_of(CONCEPTS * len(METHODS))
    with temporary_folder() as root:
        workspace(root, 3 * len(METHODS))  # as many as may run while the others are queued
        os.chdir(root)
        with Dagster(root) as ui, dg.DagsterInstance.from_config(str(root)) as instance:
            wait_for_partitions(instance)
            begun = time.monotonic()
            first = ui.backfill(every)
            print(f"{len(every)} cells: accepted in {time.monotonic() - begun:.2f} s; {load()}", flush=True)
            its_own = dg.RunsFilter(tags={"dagster/backfill": first})
            queued = wait_for(lambda: instance.get_runs_count(its_own) == len(every), 1800)
            records = runs_of(instance, first)
            ran = [record for record in records if record.start_time]
            print(
                f"all queued after {queued:.0f} s; {len(ran)} of them had run or were running by then, at most "
                f"{most_at_once(ran)} at once; {load()}",
                flush=True,
            )
            begun = time.monotonic()
            ui.cancel(first)
            wait_for(lambda: ui.status(first) == "CANCELED", 900)
            done = [record for record in runs_of(instance, first) if record.dagster_run.is_success]
            print(f"cancelled in {time.monotonic() - begun:.0f} s; {len(done)} cells were done", flush=True)
            second = ui.resume(first)
            wait_for(lambda: any(record.dagster_run.is_success for record in runs_of(instance, second)), 600)
            again = {record.dagster_run.tags["dagster/partition"] for record in runs_of(instance, second)}
            twice = again & {record.dagster_run.tags["dagster/partition"] for record in done}
            print(f"resumed: it goes on, with {len(twice)} of the cells that were done; {load()}", flush=True)
            ui.cancel(second)


# Arrival


def arrival(count: int) -> None:
    """Ticks of which nothing is new, of which one folder is, and, for comparison, reading everything once."""
    import dagster as dg

    from personalize_core.workspace import arrival as core
    from pipelines.automation.arrival import concept_folder
    from pipelines.partitions import CONCEPT
    from pipelines.resources import Workspace
    from tests.watching import concept

    with temporary_folder() as root:
        first = concept(root / "data" / "concepts", concept_name(0))
        for number in range(1, 5):
            shutil.copy(first / "00.png", first / f"{number:02d}.png")
        for number in range(1, count):
            folder = first.with_name(concept_name(number))
            folder.mkdir()
            for path in first.iterdir():
                os.link(path, folder / path.name)
            description = (first / "concept.yaml").read_text().replace(first.name, folder.name)
            (folder / "concept.yaml").unlink()
            (folder / "concept.yaml").write_text(description)
        with dg.DagsterInstance.ephemeral() as instance:
            store, cursors = Store(root), [""]

            def look() -> None:
                """A tick; what it reports is stored by the daemon, after it."""
                with dg.build_sensor_context(instance=instance, cursor=cursors[-1] or None) as context:
                    result: Any = concept_folder(context, workspace=Workspace(root=str(root)))
                cursors.append(result.cursor)
                for request in result.dynamic_partitions_requests or []:
                    instance.add_dynamic_partitions(CONCEPT, list(request.partition_keys))

            def timed(what: str, do: Any) -> None:
                begun, own = time.perf_counter(), time.process_time()
                do()
                spent = (
                    f"{time.perf_counter() - begun:.2f} s, of the process's own time {time.process_time() - own:.2f} s"
                )
                print(f"{count} concepts of 5 images, {what}: {spent}; {load()}", flush=True)

            timed("the first look", look)
            timed("the second look, which asks for the asset", look)
            timed("everything read once, by the asset", lambda: core.look(store))
            timed("a look that reports everything", look)
            for _ in range(3):
                timed("a look when nothing has changed", look)
            concept(root / "data" / "concepts", "added")
            timed("a look when one folder has come", look)
            timed("the next look, which asks for it", look)
            timed("one folder read, by the asset", lambda: core.look(store))


# DVC


def dvc() -> None:
    with temporary_folder() as root:
        store = workspace(root, len(METHODS))
        for concept, method in cells_of(CONCEPTS * len(METHODS))[len(METHODS) :]:
            for place in (store.artifact, store.grid, store.scores):
                shutil.copytree(place(method, concept_name(0)), place(method, concept))
        for number in range(1, CONCEPTS):
            shutil.copytree(store.latents(concept_name(0)), store.latents(concept_name(number)))
            shutil.copytree(
                store.scores(METHODS[0], concept_name(0)), store.scores("real_images", concept_name(number))
            )
        for folder in (store.comparison(), store.report()):
            folder.mkdir(parents=True)
            (folder / "stand_in").touch()
        for name in ("dvc.yaml", ".dvcignore"):
            shutil.copy(ROOT / name, root)
        for name in ("personalize_core", ".dvc"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp"))
        environment = os.environ | {"DVC_SITE_CACHE_DIR": str(root / ".dvc" / "site"), "PYTHONPATH": ""}
        subprocess.run(["git", "init", "--quiet", str(root)], check=True)
        files = sum(1 for path in (root / "data").rglob("*") if path.is_file())

        def run(*arguments: str) -> tuple[float, str]:
            begun = time.monotonic()
            command = [sys.executable, "-m", "dvc", *arguments]
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            return time.monotonic() - begun, done.stdout

        seconds, _ = run("commit", "--force")
        print(f"dvc commit of {files} files: {seconds:.1f} s", flush=True)
        for _ in range(3):
            seconds, said = run("repro")
            assert "Running stage" not in said
            print(f"dvc repro, {CONCEPTS} x {len(METHODS)} and nothing to do: {seconds:.1f} s; {load()}", flush=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            os.chdir(here)


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} at {datetime.now():%H:%M}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("what", choices=["direct", "daemon", "together", "backfill", "arrival", "dvc"])
    arguments.add_argument("cells", type=int, nargs="*", default=[1, 10, 100])
    chosen = arguments.parse_args()
    if chosen.what in ("direct", "daemon"):
        {"direct": direct, "daemon": daemon}[chosen.what](chosen.cells)
    elif chosen.what == "together":
        together(chosen.cells[0] if len(chosen.cells) == 1 else len(METHODS))
    elif chosen.what == "arrival":
        arrival(chosen.cells[0] if len(chosen.cells) == 1 else 10_000)
    else:
        {"backfill": backfill, "dvc": dvc}[chosen.what]()


if __name__ == "__main__":
    main()
