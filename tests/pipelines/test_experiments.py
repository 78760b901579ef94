"""Results of a protocol and of another training have assets of their own, so that none overwrites another's."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from personalize_core import steps
from pipelines.assets import chain, checks, settings
from pipelines.assets.experiments import USUAL, Experiment, experiments
from pipelines.automation import jobs
from pipelines.presentation import metadata
from pipelines.resources import Workspace
from tests.in_dagster import passing
from tests.watching import choose

PAIR = dg.MultiPartitionKey({"concept": "dog7", "method": "textual_inversion"})
QUICK, SECOND = Experiment("quick"), Experiment(None, 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "protocols").mkdir(parents=True)
    for name in ("quick", "slow"):
        (tmp_path / "data" / "protocols" / f"{name}.yaml").touch()
    return tmp_path


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[tuple]:
    """(step, protocol, repeat) of all that was asked of the core."""
    made = []

    def stand_in(name: str):
        def step(store, *arguments):
            made.append((name, store.protocol, store.repeat))
            stamp = f"{name} by {store.protocol}, {store.repeat}"
            return steps.Report(stamp=stamp, skipped=False, seconds=1.0, path=tmp_path)

        return step

    for name in ("train", "sample_grid", "score", "score_references", "compare", "report"):
        monkeypatch.setattr(steps, name, stand_in(name))
    for name in ("check_inputs", "check_repeatable", "long_work_notice"):
        monkeypatch.setattr(steps, name, lambda *what: None)
    monkeypatch.setattr(steps, "plan", lambda *what: [])
    for name in ("recipe_stamp", "sampling_stamp", "scoring_stamp"):
        monkeypatch.setattr(steps, name, lambda store, *what: f"settings of {store.protocol}")
    for name in ("loss_curve", "scores_by_prompt"):
        monkeypatch.setattr(metadata, name, lambda report: {})
    for name in ("artifact", "grid", "scores", "identity", "comparison"):
        monkeypatch.setattr(steps.result_checks, name, passing(name))
    return made


def run(instance: dg.DagsterInstance, root: Path, job: str, partition: str | None = None) -> dict[str, str | None]:
    """The assets that a job makes -> their data versions."""
    apart = chain.apart(root)
    defs = dg.Definitions(
        assets=[*chain.ALL, *(asset for each in apart for asset in each.assets)],
        asset_checks=checks.ALL,
        jobs=[*(job for each in apart for job in jobs.apart(each)), jobs.learn],
        resources={"workspace": Workspace(root=str(root))},
        executor=dg.in_process_executor,
    )
    result = defs.resolve_job_def(job).execute_in_process(instance=instance, partition_key=partition)
    assert result.success
    events = [event.step_materialization_data.materialization for event in result.get_asset_materialization_events()]
    return {event.asset_key.to_user_string(): (event.tags or {})["dagster/data_version"] for event in events}


def version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str:
    """The one that the UI shows of the pair."""
    (record,) = instance.fetch_materializations(dg.AssetRecordsFilter(key, asset_partitions=[PAIR]), limit=1).records
    assert record.asset_materialization
    return (record.asset_materialization.tags or {})["dagster/data_version"]


def test_any_name_of_a_protocol_gives_assets_and_jobs_of_its_own(root):
    """Dagster refuses other characters than letters, digits and _, and two assets whose names differ in these alone."""
    names = ["v1.5", "a-b", "a_b", "a b", "größe"]
    for name in names:
        (root / "data" / "protocols" / f"{name}.yaml").touch()
    choose(root, protocols=names)
    apart = chain.apart(root)
    assert sorted(each.experiment.protocol or "" for each in apart) == sorted(names)
    defs = dg.Definitions(
        assets=[*chain.ALL, *(asset for each in apart for asset in each.assets)],
        jobs=[job for each in apart for job in jobs.apart(each)],
        resources={"workspace": Workspace(root=str(root))},
    )
    dg.Definitions.validate_loadable(defs)
    assert Experiment("a_b").key("metrics") == dg.AssetKey(["under", "a_b", "metrics"])


def test_experiments_are_what_params_names_and_what_has_results(root):
    assert experiments(root) == []
    choose(root, protocols=["slow"], repeats=1)
    (root / "data" / "under" / "quick").mkdir(parents=True)
    (root / "data" / "under" / "deleted").mkdir()
    (root / "data" / "repeats" / "3").mkdir(parents=True)
    protocols = (None, "quick", "slow")
    assert experiments(root) == [Experiment(name, n) for n in (0, 1, 3) for name in protocols if name or n]


def test_keys_are_where_results_lie(root):
    choose(root, protocols=["quick"], repeats=1)
    keys = {asset.key.to_user_string() for each in chain.apart(root) for asset in each.assets}
    under = {f"under/quick/{name}" for name in
             ("image_grid", "metrics", "reference_scores", "external_metrics", "comparison", "report", "sampling",
              "encoders")}  # fmt: skip
    repeats = {f"repeats/1/{name}" for name in ("artifact", "image_grid", "metrics")}
    assert keys == under | repeats | {f"repeats/1/under/quick/{name}" for name in ("image_grid", "metrics")}
    usual = {asset.key.to_user_string() for asset in chain.ALL}
    assert {"artifact", "image_grid", "metrics", "comparison", "sampling"} < usual and not usual & keys


def test_a_protocol_takes_nothing_from_the_usual_results(instance, root, made):
    choose(root, protocols=["quick"])
    usual = run(instance, root, "learn", PAIR)
    assert set(usual) == {"artifact", "image_grid", "metrics"}
    made.clear()
    own = run(instance, root, "sample_under_quick", PAIR)
    assert made == [("sample_grid", "quick", 0), ("score", "quick", 0)]
    assert own == {
        "under/quick/image_grid": "sample_grid by quick, 0",
        "under/quick/metrics": "score by quick, 0",
    }
    assert version(instance, USUAL.key("image_grid")) == "sample_grid by None, 0" == usual["image_grid"]
    assert version(instance, QUICK.key("image_grid")) == "sample_grid by quick, 0"
    run(instance, root, "prepare_under_quick", "dog7")
    assert set(run(instance, root, "compare_under_quick")) == {"under/quick/comparison", "under/quick/report"}
    assert {each[1] for each in made} == {"quick"}


def test_a_protocol_has_versions_of_settings_of_its_own(instance, root, made):
    choose(root, protocols=["quick"])
    run(instance, root, "learn", PAIR)
    run(instance, root, "sample_under_quick", PAIR)
    versions = {
        name: settings.latest(instance, settings.of(experiment).sampling.key, "textual_inversion")[0]
        for name, experiment in {"usual": USUAL, "quick": QUICK}.items()
    }
    assert versions == {"usual": "settings of None", "quick": "settings of quick"}


def test_checks_of_a_protocol_are_its_own(instance, root, made, monkeypatch):
    choose(root, protocols=["quick"])
    run(instance, root, "learn", PAIR)
    gate = steps.result_checks.Gate("grid_complete", False, "one is missing", serious=False)
    other = steps.result_checks.Gate("grid_not_constant", True, "fine")
    monkeypatch.setattr(steps.result_checks, "grid", lambda *what: [gate, other])
    run(instance, root, "sample_under_quick", PAIR)
    keys = [dg.AssetCheckKey(each.key("image_grid"), "grid_complete") for each in (USUAL, QUICK)]
    found = [instance.event_log_storage.get_asset_check_execution_history(key, limit=9) for key in keys]
    assert [[(each.partition, each.status.value) for each in records] for records in found] == [
        [(PAIR, "SUCCEEDED")],
        [(PAIR, "FAILED")],
    ]


def test_another_training_has_artifacts_of_its_own(instance, root, made):
    choose(root, repeats=1)
    assert run(instance, root, "learn_repeats_1", PAIR) == {
        "repeats/1/artifact": "train by None, 1",
        "repeats/1/image_grid": "sample_grid by None, 1",
        "repeats/1/metrics": "score by None, 1",
    }
    assert made == [(step, None, 1) for step in ("train", "sample_grid", "score")]


def test_what_lies_under_a_prefix_is_one_group(root):
    choose(root, protocols=["quick"], repeats=1)
    groups = {each.experiment: {spec.group_name for asset in each.assets for spec in specs_of(asset)}
              for each in chain.apart(root)}  # fmt: skip
    assert groups == {
        QUICK: {"under_quick"}, SECOND: {"repeats_1"}, Experiment("quick", 1): {"repeats_1_under_quick"},
    }  # fmt: skip


def specs_of(asset: dg.AssetsDefinition | dg.AssetSpec) -> list[dg.AssetSpec]:
    return [asset] if isinstance(asset, dg.AssetSpec) else list(asset.specs)
