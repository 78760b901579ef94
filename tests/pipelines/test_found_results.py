"""What the command line has made is shown as if a run had: with images, scores, versions and checks, once."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST
from personalize_core.files.stamps import stamp_of
from personalize_core.workspace.external_columns import ExternalColumn
from personalize_core.workspace.lineage.records import DAMAGED, EDITED, folded
from personalize_core.workspace.store import Store
from pipelines.assets import chain, external, settings
from pipelines.assets.experiments import USUAL, Experiment
from pipelines.assets.external import LABEL
from pipelines.automation import found_results
from pipelines.automation import verdicts as told_verdicts
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from pipelines.presentation import lineage
from pipelines.resources import Workspace
from tests import tiny_workspace
from tests.in_dagster import materialize
from tests.steps.test_external import folder_of
from tests.watching import skipped

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHODS = ("base_model", "textual_inversion")
PAIR = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})
CELLS = {f"rex|{method}" for method in METHODS}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_checks, no_scatter_plot) -> Store:
    store = tiny_workspace.finished(tmp_path_factory.mktemp("finished"), ["rex"], METHODS)
    steps.compare(store)
    steps.report(store)
    return store


@pytest.fixture
def store(finished: Store, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished.root, tmp_path / "copy")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(CONCEPT, ["rex"])
        yield instance


@pytest.fixture(autouse=True)
def unhurried() -> Iterator[None]:
    """What a tick reads on a busy machine is another matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found_results, "BUDGET", 3600.0)
        yield


class Watch:
    """Ticks of the sensor, as the daemon would run them."""

    def __init__(self, instance: dg.DagsterInstance, store: Store) -> None:
        self.instance, self.store, self.cursor = instance, store, None

    def tick(self) -> str | None:
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            result = found_results.results(context, workspace=Workspace(root=str(self.store.root)))
        assert isinstance(result, dg.SensorResult) and not result.run_requests
        self.cursor = result.cursor
        return skipped(result)


@pytest.fixture
def watch(instance: dg.DagsterInstance, store: Store) -> Watch:
    return Watch(instance, store)


def last(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None = None) -> dg.AssetMaterialization:
    asked = dg.AssetRecordsFilter(key, asset_partitions=[partition] if partition else None)
    found = instance.fetch_materializations(asked, limit=1).records[0].asset_materialization
    assert found
    return found


def stale(instance: dg.DagsterInstance) -> set[tuple[str, str | None]]:
    """What the UI marks, by the rules that it goes by."""
    graph = defs.get_repository_def().asset_graph
    rules = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    keys = [key for key in instance.all_asset_keys() if graph.has(key)]
    places = [(key, p) for key in keys for p in instance.get_materialized_partitions(key) or [None]]
    return {(key.to_user_string(), p) for key, p in places if rules.get_status(key, p) == StaleStatus.STALE}


def test_all_that_is_there_is_shown_once(instance, store, watch):
    assert watch.tick() == "10 results are reported"
    for asset, partitions in {"latents": {"rex"}, "reference_scores": {"rex"}, "artifact": CELLS,
                              "image_grid": CELLS, "metrics": CELLS}.items():  # fmt: skip
        assert instance.get_materialized_partitions(USUAL.key(asset)) == partitions
    grid = last(instance, USUAL.key("image_grid"), PAIR)
    assert str(grid.metadata["grid_preview"].value).startswith("![grid](data:image/webp;base64,")
    assert "data/artifacts/textual\\_inversion/rex" in str(grid.metadata["made_from"].value)
    learned = last(instance, USUAL.key("artifact"), PAIR)
    assert "loss_preview" in learned.metadata and learned.metadata["dvc/latents"].value
    assert last(instance, USUAL.key("metrics"), PAIR).metadata["by_prompt"].value
    assert "identity_vs_text" in last(instance, USUAL.key("comparison")).metadata
    assert last(instance, USUAL.key("report"))
    assert watch.tick() == "no result that is not known already"
    watch.cursor = None  # as after a restart with another history of ticks
    assert watch.tick() == "no result that is not known already"
    assert len(instance.fetch_materializations(USUAL.key("image_grid"), limit=10).records) == len(METHODS)
    assert not instance.get_runs()


def verdicts(instance: dg.DagsterInstance, asset: str, check: str) -> dict[str | None, str]:
    """Partition -> what the UI says of the check there."""
    key = dg.AssetCheckKey(USUAL.key(asset), check)
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=10)
    return {record.partition: record.status.value for record in reversed(history)}


def test_checks_are_shown_with_the_result(instance, store, watch):
    watch.tick()
    for asset, check in [("image_grid", "grid_complete"), ("artifact", "artifact_restores")]:
        assert verdicts(instance, asset, check) == dict.fromkeys(CELLS, "SUCCEEDED")


def test_the_history_of_a_partition_is_looked_through_once_for_all_its_checks(instance, monkeypatch):
    key, asked = USUAL.key("image_grid"), []
    monkeypatch.setattr(
        told_verdicts, "_is_first", lambda instance, evaluation: asked.append(evaluation.partition) is None
    )
    names = ("grid_complete", "grid_not_constant")
    told = [dg.AssetCheckEvaluation(key, name, True, partition=PAIR) for name in names]
    assert told_verdicts.without_run(instance, told) == [] and asked == [PAIR]
    assert all(verdicts(instance, "image_grid", name) == {PAIR: "SUCCEEDED"} for name in names)


def test_a_check_is_of_the_materialization_that_it_stands_beside(instance, store, watch):
    """The page of a check shows nothing of a partition whose verdict is of no or another materialization."""
    watch.tick()
    key = dg.AssetCheckKey(USUAL.key("image_grid"), "grid_complete")
    for record in instance.event_log_storage.get_asset_check_execution_history(key, limit=10):
        asked = dg.AssetRecordsFilter(key.asset_key, asset_partitions=[record.partition])
        (materialization,) = instance.fetch_materializations(asked, limit=1).records
        assert record.evaluation.target_materialization_data.storage_id == materialization.storage_id


def test_a_result_that_is_made_again_has_its_new_verdict(store, tmp_path, monkeypatch):
    """In SQLite, as `make ui` has it: Dagster stores one evaluation without a run for each partition."""
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        instance.add_dynamic_partitions(CONCEPT, ["rex"])
        watch = Watch(instance, store)
        watch.tick()
        failed = steps.result_checks.Gate("grid_complete", False, "01_00.png cannot be read", serious=True)
        for number, fails in enumerate([True, False], start=1):
            values = yaml.safe_load((store.root / "params.yaml").read_text())
            values["sampling"]["steps"] = number
            store = tiny_workspace.write_params(store.root, values)
            steps.sample_grid(store, "rex", "base_model")
            if fails:
                monkeypatch.setattr(steps.result_checks, "grid", lambda *what: [failed])
            assert watch.tick() == "1 results are reported"
            verdict = "FAILED" if fails else "SUCCEEDED"
            assert verdicts(instance, "image_grid", "grid_complete") == {
                "rex|base_model": verdict, "rex|textual_inversion": "SUCCEEDED",
            }  # fmt: skip
            monkeypatch.undo()
            assert watch.tick() == "no result that is not known already"
        assert {(run.job_name, run.status.value) for run in instance.get_runs()} == {("verdicts", "SUCCESS")}
        assert len(instance.get_runs()) == 2


def test_a_failed_check_stands_beside_a_passing_one(instance, store, watch, monkeypatch):
    """Whether a sensor has found the result, or a run has made it."""
    gates = steps.result_checks.grid

    def grid(store: Store, concept: str, method: str) -> list[steps.result_checks.Gate]:
        if method == "base_model":
            return gates(store, concept, method)
        return [steps.result_checks.Gate("grid_complete", False, "01_00.png cannot be read", serious=False),
                steps.result_checks.Gate("grid_not_constant", True, "fine")]  # fmt: skip

    monkeypatch.setattr(steps.result_checks, "grid", grid)
    watch.tick()
    apart = {"rex|base_model": "SUCCEEDED", "rex|textual_inversion": "FAILED"}
    assert verdicts(instance, "image_grid", "grid_complete") == apart
    for partition in (PAIR, "rex|base_model"):
        assert materialize(instance, store.root, [chain.image_grid], partition).success
    assert verdicts(instance, "image_grid", "grid_complete") == apart


def test_a_run_over_a_reported_cell_finds_it_current(instance, store, watch):
    watch.tick()
    before = last(instance, USUAL.key("image_grid"), PAIR)
    result = materialize(instance, store.root, [chain.artifact, chain.image_grid, chain.metrics], PAIR)
    events = [event.step_materialization_data.materialization for event in result.get_asset_materialization_events()]
    assert len(events) == 3 and all(event.metadata["skipped"].value for event in events)
    after = last(instance, USUAL.key("image_grid"), PAIR)
    assert (after.tags or {})["dagster/data_version"] == (before.tags or {})["dagster/data_version"]
    assert after.metadata["grid"] == before.metadata["grid"]
    assert watch.tick() == "no result that is not known already"


def test_what_is_current_is_not_marked_and_what_is_not_is(instance, store, watch):
    watch.tick()
    assert stale(instance) == set()
    text = (store.root / "params.yaml").read_text()
    (store.root / "params.yaml").write_text(text.replace("batch_size: 2", "batch_size: 1"))
    with dg.build_sensor_context(instance=instance) as context:
        result = settings.settings(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(result, dg.SensorResult)
    for event in result.asset_events:
        instance.report_runless_asset_event(event)
    assert stale(instance) == {("artifact", PAIR)}


def test_what_was_out_of_date_already_is_marked_with_the_reason(instance, store, watch):
    text = (store.root / "params.yaml").read_text()
    (store.root / "params.yaml").write_text(text.replace("batch_size: 2", "batch_size: 1"))
    watch.tick()
    marked = {("artifact", PAIR), ("image_grid", PAIR), ("metrics", PAIR)}
    assert marked <= stale(instance) and ("artifact", "rex|base_model") not in stale(instance)
    assert "batch_size 2 -> 1" in str(last(instance, USUAL.key("artifact"), PAIR).metadata["out_of_date"].value)


def test_what_is_made_later_is_shown_and_only_that_is_read(instance, store, watch, monkeypatch):
    for _ in range(2):  # the files of a copy are newer than its manifests, which get another time once they are hashed
        watch.tick()
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    values["sampling"]["steps"] = 1
    store = tiny_workspace.write_params(store.root, values)
    read = []
    found_report = steps.found_report
    monkeypatch.setattr(steps, "found_report", lambda s, place: read.append(place.name) or found_report(s, place))
    steps.sample_grid(store, "rex", "base_model")
    assert watch.tick() == "1 results are reported"
    assert read == ["image_grid/base_model/rex"]


def test_what_a_run_is_at_work_on_is_left_to_it(instance, store, watch, monkeypatch):
    monkeypatch.setattr(found_results, "under_way", lambda instance: {str(PAIR)})
    assert watch.tick() == "5 results are reported; 5 wait"
    assert instance.get_materialized_partitions(USUAL.key("artifact")) == {"rex|base_model"}
    monkeypatch.undo()
    assert watch.tick() == "5 results are reported"


def test_a_damaged_result_is_named_and_not_shown_until_it_is_whole(instance, store, watch, monkeypatch):
    path = store.grid("textual_inversion", "rex") / "grid.png"
    content = path.read_bytes()
    path.unlink()
    assert watch.tick() == "9 results are reported; 1 wait"
    assert instance.get_materialized_partitions(USUAL.key("image_grid")) == {"rex|base_model"}
    path.write_bytes(content)  # as DVC writes one file after another
    assert watch.tick() == "1 results are reported"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def without_bytes(manifest: dict) -> None:
    for entry in manifest["files"].values():
        del entry["bytes"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest.pop("made_from"), DAMAGED),
        (lambda manifest: manifest["made_from"].update(concept="another"), EDITED),
        (without_bytes, DAMAGED),
    ],
    ids=["what it is made from is gone", "what it is made from is edited", "the sizes of its files are gone"],
)
def test_a_damaged_manifest_is_named_and_stops_no_other_result(instance, store, watch, change, said):
    edit(next(path.parent for path in store.latents("rex").glob(f"*/{MANIFEST}")), change)
    with pytest.raises(InputError, match=said):
        steps.found_report(store, steps.Place("latents", "rex"))
    assert watch.tick() == "9 results are reported; 1 wait"
    assert not instance.get_materialized_partitions(USUAL.key("latents"))


def test_a_result_whose_folder_is_gone_since_it_was_listed_stops_no_other(instance, store, watch, monkeypatch):
    """As where a person removes data/latents during a tick."""
    listed = steps.results_there(store, ["rex"])
    monkeypatch.setattr(steps, "results_there", lambda *what: listed)
    shutil.rmtree(store.latents("rex"))
    assert watch.tick() == "9 results are reported; 1 wait"


def test_latents_are_reported_as_todays_methods_use_them(instance, store):
    """And not with the stamp of those that a method of an earlier params.yaml has left."""
    place = steps.Place("latents", "rex")
    expected = steps.encode_images(store, "rex").stamp
    folder = next(path.parent for path in store.latents("rex").glob(f"*/{MANIFEST}"))
    left = folder.with_name("0_left_over")  # the first in alphabetical order
    shutil.copytree(folder, left)

    def other(manifest: dict) -> None:
        manifest["made_from"]["concept"] = "another"
        manifest["stamp"] = str(stamp_of(folded(manifest["made_from"])))

    edit(left, other)
    assert steps.found_report(store, place).stamp == expected


def test_latents_of_no_method_of_today_are_not_reported(instance, store, watch):
    for path in [*store.latents("rex").iterdir()]:
        path.rename(path.with_name(f"{path.name}_left_over"))
    assert watch.tick() == "9 results are reported"
    assert not instance.get_materialized_partitions(USUAL.key("latents"))


def test_verdicts_are_told_where_a_later_result_cannot_be_reported(instance, store, watch, monkeypatch):
    inputs = found_results._inputs

    def failing(instance: dg.DagsterInstance, found: found_results.Found) -> Iterator[tuple[str, str]]:
        if found.place.kind == "report":
            raise OSError("no space left on device")
        return inputs(instance, found)

    monkeypatch.setattr(found_results, "_inputs", failing)
    with pytest.raises(OSError):
        watch.tick()
    assert verdicts(instance, "image_grid", "grid_complete") == dict.fromkeys(CELLS, "SUCCEEDED")


def test_a_setting_that_cannot_be_read_holds_up_its_own_results_only(instance, store, watch, monkeypatch):
    def damaged(store: Store, method: str) -> str:
        raise InputError("the prompts are damaged")

    monkeypatch.setattr(steps, "sampling_stamp", damaged)
    assert watch.tick() == "8 results are reported; 2 wait"
    assert instance.get_materialized_partitions(USUAL.key("metrics")) == CELLS
    assert not instance.get_materialized_partitions(USUAL.key("image_grid"))


def test_a_result_that_is_out_of_date_is_shown_where_its_setting_cannot_be_read(instance, store, watch, monkeypatch):
    def damaged(store: Store, method: str) -> str:
        raise InputError("the prompts are damaged")

    monkeypatch.setattr(steps, "sampling_stamp", damaged)
    monkeypatch.setattr(steps, "why_out_of_date", lambda store, place, cells: "it is sampled otherwise now")
    assert watch.tick() == "10 results are reported"
    tags = last(instance, USUAL.key("image_grid"), PAIR).tags or {}
    assert tags["dagster/input_data_version/sampling"] == found_results.UNKNOWN


def test_a_run_that_compares_is_left_to_report_the_comparison(instance, store, watch):
    """It has no partition."""
    run = instance.create_run_for_job(defs.resolve_job_def("compare"), status=dg.DagsterRunStatus.STARTED)
    assert watch.tick() == "8 results are reported; 2 wait"
    instance.delete_run(run.run_id)
    assert watch.tick() == "2 results are reported"


def test_a_damaged_protocol_hides_no_change_of_the_others(instance, store):
    (store.data / "protocols").mkdir()
    (store.data / "protocols" / "broken.yaml").write_text("title: [")
    with (store.root / "params.yaml").open("a") as params:
        params.write("automation: {protocols: [broken]}\n")
    with dg.build_sensor_context(instance=instance) as context:
        result = settings.settings(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(result, dg.SensorResult)
    assert {event.asset_key for event in result.asset_events} == {each.key for each in settings.USUAL.all}


def test_a_damaged_protocol_holds_up_no_result_of_the_others(instance, store, watch):
    (store.data / "protocols").mkdir()
    (store.data / "protocols" / "broken.yaml").write_text("title: [")
    with (store.root / "params.yaml").open("a") as params:
        params.write("automation: {protocols: [broken]}\n")
    assert watch.tick() == "10 results are reported"


def test_a_damaged_section_of_a_method_hides_no_change_of_the_others(instance, store):
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    values["methods"]["textual_inversion"][values["base_model"]]["tempo"] = 3
    store = tiny_workspace.write_params(store.root, values)
    with dg.build_sensor_context(instance=instance) as context:
        result = settings.settings(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(result, dg.SensorResult)
    found = {(event.asset_key.to_user_string(), event.partition) for event in result.asset_events}
    assert {("recipe", "base_model"), ("sampling", "base_model"), ("encoders", None)} <= found
    assert ("recipe", "textual_inversion") not in found


def test_a_damaged_params_yaml_is_named_and_nothing_is_read(instance, store):
    (store.root / "params.yaml").write_text("base_model: [")
    with dg.build_sensor_context(instance=instance) as context:
        said = found_results.results(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(said, dg.SkipReason) and "params.yaml" in (said.skip_message or "")


def test_a_large_input_is_not_hashed_by_a_tick(store, monkeypatch):
    report, folder = (
        steps.found_report(store, steps.Place("image_grid", "rex", METHODS[1])),
        store.artifact(METHODS[1], "rex"),
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert "dvc/artifact" in lineage.behind(store, report, size, artifact=folder)
    monkeypatch.setattr(lineage, "dvc_hash", lambda path: pytest.fail("it was read"))
    assert "dvc/artifact" not in lineage.behind(store, report, size - 1, artifact=folder)


def test_time_that_is_up_leaves_the_rest_to_the_next_tick(instance, store, watch, monkeypatch):
    monkeypatch.setattr(found_results, "BUDGET", -1.0)
    assert watch.tick() == "no result that is not known already; 10 wait"
    monkeypatch.undo()
    assert watch.tick() == "10 results are reported"


def test_a_protocols_results_are_shown_as_its_own(instance, store, watch):
    (store.data / "protocols").mkdir()
    (store.data / "protocols" / "quick.yaml").write_text(
        "title: Quick\nsource: ours\nprompts: [{name: two}]\nsampler: ddim\nsteps: 1\nguidance: 3.0\n"
        "images_per_prompt: 1\n"
    )
    steps.sample_grid(Store(store.root, "quick"), "rex", "base_model")
    watch.tick()
    quick = Experiment("quick")
    assert instance.get_materialized_partitions(quick.key("image_grid")) == {"rex|base_model"}
    tags = [last(instance, each.key("image_grid"), "rex|base_model").tags or {} for each in (quick, USUAL)]
    assert tags[0]["dagster/data_version"] != tags[1]["dagster/data_version"]


def test_an_external_column_is_shown_with_its_images(instance, store, watch, tmp_path):
    column = ExternalColumn(folder=str(folder_of(tmp_path / "out")), source="FLUX.1-dev")
    steps.add_external(store, "flux", "rex", column)
    steps.score_external(store, "rex", "flux")
    assert watch.tick() == "10 results are reported"
    instance.add_dynamic_partitions(LABEL, ["flux"])
    assert watch.tick() == "1 results are reported"
    both = dg.MultiPartitionKey({"concept": "rex", "label": "flux"})
    found = last(instance, USUAL.key("external_metrics"), both)
    assert "grid_preview" in found.metadata and found.metadata["by_prompt"].value
    for check in ("scores_in_range", "scores_complete"):
        assert verdicts(instance, "external_metrics", check) == {both: "SUCCEEDED"}
    with dg.build_sensor_context(instance=instance) as context:
        result = external.external_columns(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(result, dg.SensorResult) and not result.run_requests  # it has been scored since it was described
    assert stale(instance) == set()
    done = materialize(instance, store.root, [external.external_metrics], both)
    (event,) = done.get_asset_materialization_events()
    assert event.materialization.metadata["skipped"].value
    assert event.materialization.metadata["grid"] == found.metadata["grid"]
    assert {each.check_name for each in done.get_asset_check_evaluations()} == {"scores_in_range", "scores_complete"}


def test_with_a_file_server_the_history_holds_links_and_kilobytes(store, tmp_path):
    """In SQLite, as `make ui` has it."""
    sizes: list[dict[str, int]] = []
    text = (store.root / "params.yaml").read_text()
    address = "http://127.0.0.1:8000/data/"
    for name, more in {"copies": "", "links": f"automation: {{base_url: '{address}'}}\n"}.items():
        (store.root / "params.yaml").write_text(text + more)
        (tmp_path / name).mkdir()
        with dg.DagsterInstance.local_temp(str(tmp_path / name)) as instance:
            instance.add_dynamic_partitions(CONCEPT, ["rex"])
            assert Watch(instance, store).tick() == "10 results are reported"
            sizes.append(largest_rows(tmp_path / name))
            grid = last(instance, USUAL.key("image_grid"), PAIR)
    expected = f"{address}grids/textual_inversion/rex/grid.png?{(grid.tags or {})['dagster/data_version']}"
    assert grid.metadata["grid"] == dg.MetadataValue.url(expected)
    # A thumbnail: Dagster would show a linked image in its full width.
    assert len(str(grid.metadata["grid_preview"].value)) < 1000
    copies, links = sizes
    assert max(links.values()) < 8_000 and copies["image_grid"] > links["image_grid"]


def largest_rows(home: Path) -> dict[str, int]:
    """Asset -> bytes of its largest event in the database."""
    (index,) = home.rglob("index.db")
    with closing(sqlite3.connect(index)) as opened:
        query = "SELECT asset_key, max(length(event)) FROM event_logs WHERE dagster_event_type = ? GROUP BY asset_key"
        return {json.loads(key)[-1]: size for key, size in opened.execute(query, ("ASSET_MATERIALIZATION",))}


def test_a_tick_imports_no_torch(store, tmp_path):
    program = """
import sys, dagster as dg
from pipelines.automation import found_results
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace
found_results.BUDGET = 3600.0
with dg.DagsterInstance.ephemeral() as instance:
    instance.add_dynamic_partitions(CONCEPT, ["rex"])
    with dg.build_sensor_context(instance=instance) as context:
        print(found_results.results(context, workspace=Workspace(root=sys.argv[1])).skip_reason.skip_message)
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", program, str(store.root)], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    assert said == ["10 results are reported", "[]"]
