"""All stale cells of a concept in one run: what it makes and reports is what a run for each cell would have made."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from personalize_core import steps
from personalize_core.base_model import loading
from personalize_core.errors import InputError
from personalize_core.workspace.store import Store
from pipelines import partitions
from pipelines.assets import settings
from pipelines.automation import requests, schedules
from pipelines.automation.found_results import results
from pipelines.automation.together import keys_of, learn_concept
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace
from tests import tiny_workspace
from tests.watching import choose, evening

ROOT = Path(__file__).parents[2]
METHODS = ("base_model", "textual_inversion", "personalized_residuals")
KINDS = ("artifact", "image_grid", "metrics")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    store = tiny_workspace.make(root)
    tiny_workspace.write_params(root, tiny_workspace.params_of(root, METHODS))
    steps.encode_images(store, "rex")
    steps.score_references(store, "rex")
    return root


@pytest.fixture
def root(prepared, tmp_path, monkeypatch) -> Path:
    tiny_workspace.copy_of(prepared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = defs.resolve_job_def(learn_concept.name)
    return job.execute_in_process(instance=instance, partition_key="rex", raise_on_error=False)


def materialized(instance: dg.DagsterInstance) -> dict[tuple[str, str], dg.AssetMaterialization]:
    """The last event of each asset and method."""
    found = {}
    for kind in KINDS:
        for method in METHODS:
            asked = dg.AssetRecordsFilter(dg.AssetKey(kind), asset_partitions=[f"rex|{method}"])
            for record in instance.fetch_materializations(asked, limit=1).records:
                found[kind, method] = record.asset_materialization
    return found


def stamps(store: Store, method: str) -> dict[str, str]:
    """What the manifests say, read without the core."""
    folders = {
        "artifact": store.artifact(method, "rex"), "image_grid": store.grid(method, "rex"),
        "metrics": store.scores(method, "rex"),
    }  # fmt: skip
    return {kind: json.loads((folder / "manifest.json").read_text())["stamp"] for kind, folder in folders.items()}


def verdicts(instance: dg.DagsterInstance, kind: str, check: str) -> dict[str | None, str]:
    key = dg.AssetCheckKey(dg.AssetKey(kind), check)
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=99)
    return {record.partition: record.status.value for record in history}


@pytest.mark.slow
def test_one_run_makes_every_stale_cell_and_reports_each_by_itself(instance, root):
    loading.load_base_model.cache_clear()
    done = learn(instance)
    assert done.success
    assert loading.load_base_model.cache_info().misses == 1
    events = materialized(instance)
    assert events.keys() == {(kind, method) for kind in KINDS for method in METHODS}
    store = Store(root)
    for (kind, method), event in events.items():
        assert (event.tags or {})["dagster/data_version"] == stamps(store, method)[kind]
        assert event.metadata["skipped"].value is False
    assert steps.plan(store, ["rex"]) == []
    for kind, check in (("artifact", "loss_finite"), ("image_grid", "grid_complete"), ("metrics", "scores_complete")):
        assert verdicts(instance, kind, check) == {f"rex|{method}": "SUCCEEDED" for method in METHODS}
    version = steps.recipe_stamp(store, "textual_inversion")
    assert (events["artifact", "textual_inversion"].tags or {})["dagster/input_data_version/recipe"] == version
    assert settings.latest(instance, settings.USUAL.recipe.key, "textual_inversion")[0] == version

    with dg.build_sensor_context(instance=instance) as context:
        results(context, workspace=Workspace(root=str(root)))
    assert materialized(instance) == events  # the sensor finds nothing that was not reported

    again = learn(instance)
    assert again.success
    assert [event.step_key for event in again.all_events if event.is_step_start] == ["stale_methods"]


@pytest.mark.slow
def test_a_cell_that_fails_stops_no_other_and_is_made_by_the_next_run(instance, root, monkeypatch):
    train = steps.train

    def failing(store, concept, method, listener):
        if method == "textual_inversion":
            raise InputError("its recipe cannot be used; write another")
        return train(store, concept, method, listener)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train", failing)
        done = learn(instance)
    assert not done.success
    others = {method for method in METHODS if method != "textual_inversion"}
    assert materialized(instance).keys() == {(kind, method) for kind in KINDS for method in others}
    (failed,) = [event for event in done.all_events if event.is_step_failure]
    assert failed.step_key == "train_cell[textual_inversion]"
    why = failed.step_failure_data.user_failure_data
    assert why and why.description == "textual_inversion on rex: its recipe cannot be used; write another"

    again = learn(instance)
    assert again.success
    started = [event.step_key for event in again.all_events if event.is_step_start]
    assert started == ["stale_methods", *(f"{step}_cell[textual_inversion]" for step in ("train", "sample", "score"))]


@pytest.mark.slow
def test_a_serious_check_that_fails_stops_its_own_cell(instance, root, monkeypatch):
    artifact = steps.result_checks.artifact

    def diverged(store, concept, method):
        gates = artifact(store, concept, method)
        return (
            [steps.result_checks.Gate("loss_finite", False, "it is not"), *gates[1:]] if method == METHODS[2] else gates
        )

    monkeypatch.setattr(steps.result_checks, "artifact", diverged)
    done = learn(instance)
    assert not done.success
    made = materialized(instance).keys()
    assert {kind for kind, method in made if method == METHODS[2]} == {"artifact"}
    assert {kind for kind, method in made if method == METHODS[1]} == set(KINDS)
    assert verdicts(instance, "artifact", "loss_finite")[f"rex|{METHODS[2]}"] == "FAILED"
    (failed,) = [event for event in done.all_events if event.is_step_failure]
    why = failed.step_failure_data.user_failure_data
    assert why and why.description == "personalized_residuals on rex: the check loss_finite failed: it is not"


# What is asked for


NIGHT = datetime.datetime(2026, 11, 30, 2)


def test_together_the_night_asks_for_one_run_for_each_concept(root, tmp_path_factory, monkeypatch):
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("history"))) as instance:
        instance.add_dynamic_partitions(CONCEPT, ["rex"])
        asked = {}
        for job in (schedules.jobs.learn, learn_concept):
            monkeypatch.setattr(schedules, "TRAINS", job)
            with evening(instance, Workspace(root=str(root)), NIGHT) as context:
                asked[job.name] = schedules.nightly(context)
    assert {str(request.partition_key) for request in asked["learn"]} == {f"rex|{method}" for method in METHODS}
    (request,) = asked["learn_concept"]
    assert (request.job_name, request.partition_key) == ("learn_concept", "rex")
    assert all(method in request.tags["personalize/why"] for method in METHODS)


def test_every_method_has_a_key_of_its_own_that_dagster_takes():
    """Of those with a dot in their names too, and of those whose names differ by nothing else."""
    methods = [*partitions.METHODS, "oft@lr_1.5", "oft@lr_1-5", "oft@lr_1_5"]
    keys = keys_of(methods)
    assert list(keys.values()) == methods
    for key in keys:
        dg.DynamicOutput(None, mapping_key=key)
    assert keys["dreambooth__adaptive"] == "dreambooth@adaptive"


OWN = "textual_inversion@two_steps"


def test_an_ablation_of_ones_own_is_a_partition_once_definitions_are_loaded_again(root, instance):
    """In this process they were loaded before it was written; in one that begins then, one run makes it."""
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["ablations"] = {OWN: {values["base_model"]: {"steps": 2}}}
    store = tiny_workspace.write_params(root, values)
    said = {cell.method: cell for cell in requests.stale(instance, store, ["rex"])}
    assert set(said) == {*METHODS, OWN} and not said[OWN].possible and "Reload" in said[OWN].why
    with dg.build_sensor_context(instance=instance) as context:
        result = settings.settings(context, workspace=Workspace(root=str(root)))
    assert isinstance(result, dg.SensorResult)
    assert {event.partition for event in result.asset_events} == {*METHODS, None}

    for method in (*METHODS, OWN):
        steps.train(store, "rex", method)
    with dg.build_sensor_context(instance=instance) as context:
        results(context, workspace=Workspace(root=str(root)))
    assert {method for _, method in materialized(instance)} == set(METHODS)
    program = """
from pathlib import Path
import dagster as dg
from personalize_core.workspace.store import Store
from pipelines.automation import requests
from pipelines.definitions import defs
with dg.instance_for_test() as instance:
    instance.add_dynamic_partitions("concept", ["rex"])
    stale = requests.stale(instance, Store(Path.cwd()), ["rex"])
    assert all(cell.possible for cell in stale)
    job = defs.resolve_job_def("learn_concept")
    done = job.execute_in_process(instance=instance, partition_key="rex")
    print(done.success, *sorted(step.step_key for step in done.get_step_success_events()), sep="\\n")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True" and "score_cell[textual_inversion__two_steps]" in lines
    assert (store.scores(OWN, "rex") / "scores.parquet").is_file()


@pytest.mark.parametrize("together", [True, False])
def test_the_setting_chooses_the_job_when_definitions_are_loaded(together, tmp_path):
    choose(tmp_path, together=together)
    program = (
        "from pipelines.automation.schedules import *; print(nightly.job_name, training_follows.targets[0].job_name)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert set(said.split()) == {"learn_concept" if together else "learn"}


def test_what_one_run_makes_together_is_not_asked_for_again(instance, root):
    assert {cell.method for cell in requests.stale(instance, Store(root), ["rex"])} == set(METHODS)
    tags = {"dagster/partition": "rex"}
    run = instance.create_run_for_job(learn_concept, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert requests.stale(instance, Store(root), ["rex"]) == []
    instance.report_run_failed(run)
    assert {cell.method for cell in requests.stale(instance, Store(root), ["rex"])} == set(METHODS)


def test_a_cell_with_a_run_of_its_own_is_left_to_that_run(instance, root):
    tags = {"dagster/partition": "rex|textual_inversion"}
    instance.create_run_for_job(defs.resolve_job_def("learn"), tags=tags, status=dg.DagsterRunStatus.STARTED)
    left = {cell.method for cell in requests.without_run(instance, Store(root), ["rex"])}
    assert left == {"base_model", "personalized_residuals"}
