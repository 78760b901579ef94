"""Only what changed is made again: on a real instance, with tiny models, through the schedules as the daemon runs them.

A night here is: both schedules are evaluated, every run that they ask for is executed, and so is what follows a
preparation, until nothing is asked for any more.
"""

from __future__ import annotations

import datetime
import itertools
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from PIL import Image

from personalize_core.concepts import concept_files
from personalize_core.workspace.store import Store
from pipelines.assets import chain, settings
from pipelines.automation import schedules
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace
from tests import tiny_workspace
from tests.watching import Watch, evening

pytestmark = [pytest.mark.usefixtures("short_checks", "no_scatter_plot"), pytest.mark.slow]

METHODS = ("base_model", "textual_inversion", "dreambooth")
COUNT = itertools.count()


class Pipeline:
    """A workspace and an instance on disk, and what the daemon would do with them."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.instance = dg.DagsterInstance.local_temp(str(home))
        self.watch = Watch(self.instance, root)
        self.workspace = Workspace(root=str(root))

    @property
    def store(self) -> Store:
        return Store(self.root)

    def look(self) -> None:
        """The sensors, as often as it takes for folders to settle."""
        self.watch.twice()
        with dg.build_sensor_context(instance=self.instance) as context:
            result = settings.settings(context, workspace=self.workspace)
        assert isinstance(result, dg.SensorResult)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)

    def night(self) -> dict[str, set[str]]:
        """Returns asset -> the partitions that were made anew; what a run kept is not among them."""
        self.look()
        made: dict[str, set[str]] = {}
        when = datetime.datetime(2026, 11, 22, 2, tzinfo=datetime.UTC) + datetime.timedelta(days=next(COUNT))
        with evening(self.instance, self.workspace, when) as context:
            asked = [*self.asked(schedules.nightly(context))]
            asked += self.asked(schedules.nightly_preparation(context))
        while asked:
            run = self.execute(asked.pop(0), made)
            if run.job_name == "prepare":
                following = dg.build_run_status_sensor_context(
                    "training_follows",
                    dagster_instance=self.instance,
                    dagster_run=run,
                    dagster_event=self.instance.get_records_for_run(run.run_id)
                    .records[-1]
                    .event_log_entry.dagster_event,  # type: ignore
                )
                asked += self.asked(schedules.training_follows(following, workspace=self.workspace))
        return made

    def asked(self, result: Any) -> list[dg.RunRequest]:
        return [] if isinstance(result, dg.SkipReason) else list(result)

    def execute(self, request: dg.RunRequest, made: dict[str, set[str]]) -> dg.DagsterRun:
        job = defs.resolve_job_def(str(request.job_name))
        config = {"resources": {"workspace": {"config": {"root": str(self.root)}}}}
        result = job.execute_in_process(
            config, instance=self.instance, partition_key=request.partition_key, tags=dict(request.tags)
        )
        assert result.success
        for event in result.get_asset_materialization_events():
            about = event.step_materialization_data.materialization
            if not about.metadata["skipped"].value:
                made.setdefault(about.asset_key.to_user_string(), set()).add(str(about.partition))
        return result.dagster_run

    def shown_as_stale(self) -> dict[str, set[str]]:
        """asset -> the partitions that the UI marks as stale, by the rules that it goes by."""
        graph = defs.get_repository_def().asset_graph
        rules = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        concepts = self.instance.get_dynamic_partitions(CONCEPT)
        pairs = [f"{concept}|{method}" for concept in concepts for method in METHODS]
        found: dict[str, set[str]] = {}
        for asset, keys in (
            (chain.latents, concepts),
            (chain.artifact, pairs),
            (chain.image_grid, pairs),
            (chain.metrics, pairs),
        ):
            stale = {key for key in keys if rules.get_status(asset.key, key) == StaleStatus.STALE}
            found |= {asset.key.to_user_string(): stale} if stale else {}
        return found


def params(root: Path, methods: tuple[str, ...] = METHODS) -> dict:
    values = tiny_workspace.params(root)
    values["methods"] = {name: values["methods"][name] for name in methods}
    values["variants"] = {}
    return values


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    """After the first night."""
    root = tmp_path_factory.mktemp("workspace")
    tiny_workspace.make(root)
    tiny_workspace.write_params(root, params(root))
    pipeline = Pipeline(root, tmp_path_factory.mktemp("home"))
    made = pipeline.night()
    return pipeline, made


@pytest.fixture
def pipeline(first, tmp_path: Path) -> Pipeline:
    """The same, for a test to change: the models stay where they are."""
    before, _ = first
    root, home = tmp_path / "workspace", tmp_path / "home"
    shutil.copytree(before.root, root, ignore=shutil.ignore_patterns("models"))
    shutil.copytree(before.instance.root_directory, home)
    again = Pipeline(root, home)
    again.watch.cursor = before.watch.cursor
    again.look()  # the copies are other files, and are read once more
    return again


def cells(*concepts: str, methods: tuple[str, ...] = METHODS) -> set[str]:
    return {f"{concept}|{method}" for concept in concepts for method in methods}


def change(pipeline: Pipeline, edit, methods: tuple[str, ...] = METHODS) -> None:
    models = Path(pipeline.store.params.base_model).parents[1]
    values = params(models, methods)
    edit(values)
    tiny_workspace.write_params(pipeline.root, values)


def test_the_first_night_makes_everything(first):
    _, made = first
    everything = cells("cup", "rex")
    concepts = {"cup", "rex"}
    assert made == {
        "latents": concepts,
        "class_images": concepts,
        "reference_scores": concepts,
        "artifact": everything,
        "image_grid": everything,
        "metrics": everything,
    }


def test_nothing_changed_nothing_runs_and_nothing_is_shown_as_stale(pipeline):
    before = pipeline.instance.get_runs_count()
    assert pipeline.night() == {}
    assert pipeline.instance.get_runs_count() == before
    assert pipeline.shown_as_stale() == {}


def test_one_concept_image_changed_its_concept_alone_is_stale_and_is_made(pipeline):
    Image.new("RGB", (20, 20), "red").save(pipeline.store.concept_folder("rex") / "0.png")
    pipeline.look()
    assert pipeline.shown_as_stale() == {"latents": {"rex"}, "metrics": cells("rex")}  # what hangs on these follows
    own = cells("rex")
    assert pipeline.night() == {
        "latents": {"rex"},
        "reference_scores": {"rex"},
        "artifact": own,
        "image_grid": own,
        "metrics": own,
    }
    assert pipeline.shown_as_stale() == {} and pipeline.night() == {}


def test_one_recipe_changed_its_method_alone_is_stale_and_is_made(pipeline):
    base = pipeline.store.params.base_model
    change(pipeline, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.1))
    own = cells("cup", "rex", methods=("textual_inversion",))
    pipeline.look()
    assert pipeline.shown_as_stale() == {"artifact": own}
    assert pipeline.night() == {"artifact": own, "image_grid": own, "metrics": own}
    assert pipeline.shown_as_stale() == {} and pipeline.night() == {}


def test_more_class_images_for_one_method_leave_the_others_alone(pipeline):
    base = pipeline.store.params.base_model
    change(pipeline, lambda values: values["methods"]["dreambooth"][base].update(class_images=3))
    own = cells("cup", "rex", methods=("dreambooth",))
    made = pipeline.night()
    assert {name: made[name] for name in ("artifact", "image_grid", "metrics")} == dict.fromkeys(
        ("artifact", "image_grid", "metrics"), own
    )
    assert pipeline.shown_as_stale() == {} and pipeline.night() == {}


def test_a_method_added_is_one_row(pipeline):
    change(pipeline, lambda values: None, (*METHODS, "personalized_residuals"))
    own = cells("cup", "rex", methods=("personalized_residuals",))
    made = pipeline.night()
    assert {name: made.get(name) for name in ("artifact", "image_grid", "metrics")} == dict.fromkeys(
        ("artifact", "image_grid", "metrics"), own
    )
    assert pipeline.shown_as_stale() == {} and pipeline.night() == {}


def test_another_sampler_samples_and_scores_and_trains_nothing(pipeline):
    change(pipeline, lambda values: values["sampling"].update(steps=3))
    pipeline.look()
    everything = cells("cup", "rex")
    assert pipeline.shown_as_stale() == {"image_grid": everything}
    assert pipeline.night() == {"image_grid": everything, "metrics": everything}
    assert pipeline.shown_as_stale() == {}


def test_a_concept_added_is_made_and_the_others_are_not(pipeline, tmp_path):
    tiny_workspace.paint_concept_images(tmp_path / "photos" / "max", count=2, seed=9)
    concept_files.add_concept(pipeline.store.concepts, tmp_path / "photos" / "max", "dog")
    made = pipeline.night()
    assert made["artifact"] == made["image_grid"] == made["metrics"] == cells("max")
    assert made["latents"] == made["reference_scores"] == {"max"}
    assert pipeline.shown_as_stale() == {}


def test_a_run_whose_recipe_no_sensor_has_seen_is_not_shown_as_stale_afterwards(pipeline):
    base = pipeline.store.params.base_model
    change(pipeline, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.1))
    request = dg.RunRequest(
        job_name="learn", partition_key=dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})
    )
    pipeline.execute(request, {})
    pipeline.look()
    assert pipeline.shown_as_stale() == {"artifact": {"cup|textual_inversion"}}


# What is asked for


def requests_of_tonight(pipeline: Pipeline) -> tuple[Any, Any]:
    when = datetime.datetime(2027, 1, 1, 2, tzinfo=datetime.UTC)
    with evening(pipeline.instance, pipeline.workspace, when) as context:
        return schedules.nightly(context), schedules.nightly_preparation(context)


def test_a_cell_that_waits_or_runs_already_is_not_asked_for_again(pipeline):
    base = pipeline.store.params.base_model
    change(pipeline, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.1))
    own = cells("cup", "rex", methods=("textual_inversion",))
    training, preparing = requests_of_tonight(pipeline)
    assert {str(request.partition_key) for request in training} == own
    assert isinstance(preparing, dg.SkipReason)
    assert all("lr" in request.tags["personalize/why"] for request in training)
    pipeline.instance.add_run(
        dg.DagsterRun("learn", status=dg.DagsterRunStatus.STARTED, tags={"dagster/partition": "rex|textual_inversion"})
    )
    training, _ = requests_of_tonight(pipeline)
    assert {str(request.partition_key) for request in training} == own - {"rex|textual_inversion"}


def test_a_broken_concept_stops_no_other(pipeline):
    (pipeline.store.concept_folder("cup") / "0.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20), "red").save(pipeline.store.concept_folder("rex") / "0.png")
    made = pipeline.night()
    assert made["artifact"] == cells("rex")


def test_a_damaged_params_file_asks_for_nothing_and_says_so(pipeline):
    (pipeline.root / "params.yaml").write_text("base_modle: x")
    for result in requests_of_tonight(pipeline):
        assert isinstance(result, dg.SkipReason) and "'base_model' is missing" in str(result.skip_message)


def test_a_preparation_that_a_person_started_trains_nothing(pipeline):
    (pipeline.store.concept_folder("rex") / "0.png").unlink()
    run = pipeline.execute(dg.RunRequest(job_name="prepare", partition_key="rex"), {})
    event = pipeline.instance.get_records_for_run(run.run_id).records[-1].event_log_entry.dagster_event
    context = dg.build_run_status_sensor_context(
        "training_follows",
        dagster_instance=pipeline.instance,
        dagster_run=run,
        dagster_event=event,  # type: ignore
    )
    assert isinstance(schedules.training_follows(context, workspace=pipeline.workspace), dg.SkipReason)


# The comparison


def test_the_comparison_and_its_report_follow_new_scores_once(pipeline):
    first = dg.evaluate_automation_conditions(defs, pipeline.instance)
    cell = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})
    pipeline.execute(dg.RunRequest(job_name="learn", partition_key=cell), {})
    second = dg.evaluate_automation_conditions(defs, pipeline.instance, cursor=first.cursor)
    assert second.get_num_requested(dg.AssetKey("comparison")) == 1
    assert second.get_num_requested(dg.AssetKey("report")) == 1
    third = dg.evaluate_automation_conditions(defs, pipeline.instance, cursor=second.cursor)
    assert third.total_requested == 0
