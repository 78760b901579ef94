"""Old runs go, and no result with them."""

from __future__ import annotations

import time
from pathlib import Path

import dagster as dg

from personalize_core import steps
from pipelines.assets import chain
from pipelines.automation import retention, verdicts
from pipelines.resources import Workspace
from tests.in_dagster import materialize, passing
from tests.watching import choose


def prepared(instance: dg.DagsterInstance, root: Path, concept: str) -> str:
    return materialize(instance, root, [chain.latents], concept).run_id


def said(instance: dg.DagsterInstance, root: Path) -> str | None:
    with dg.build_sensor_context(instance=instance) as context:
        skipped = retention.old_runs(context, workspace=Workspace(root=str(root)))
    assert isinstance(skipped, dg.SkipReason)
    return skipped.skip_message


def test_a_run_is_deleted_once_a_later_one_of_its_partition_has_succeeded(instance, monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "encode_images", lambda *arguments: steps.Report("s", False, 1.0, tmp_path))
    monkeypatch.setattr(steps.result_checks, "latents", passing("latents"))
    older, newer, other = (prepared(instance, tmp_path, name) for name in ("dog7", "dog7", "rex"))
    assert list(retention.superseded(instance, time.time() - 1000)) == []
    assert list(retention.superseded(instance, time.time() + 1)) == [older]
    choose(tmp_path)
    assert said(instance, tmp_path) == "all runs are kept (automation.keep_runs)"
    choose(tmp_path, keep_runs=1)
    assert said(instance, tmp_path) == "0 runs were deleted"
    later = time.time() + 2 * retention.DAY
    monkeypatch.setattr(retention.time, "time", lambda: later)
    assert said(instance, tmp_path) == "1 runs were deleted"
    assert {run.run_id for run in instance.get_runs()} == {newer, other}
    assert instance.get_materialized_partitions(chain.latents.key) == {"dog7", "rex"}


def reported(instance: dg.DagsterInstance, *methods: str) -> str:
    """A run of `learn_concept`, which materializes the grids of these methods."""

    @dg.op(out=dg.Out(dg.Nothing))
    def cells():
        for method in methods:
            yield dg.AssetMaterialization("image_grid", partition=f"rex|{method}")
        yield dg.Output(None)

    @dg.job(name="learn_concept", executor_def=dg.in_process_executor)
    def job():
        cells()

    return job.execute_in_process(instance=instance, tags={"dagster/partition": "rex"}).run_id


def superseded(instance: dg.DagsterInstance) -> list[str]:
    return list(retention.superseded(instance, time.time() + 1))


def test_a_run_of_many_cells_stays_until_each_of_them_has_been_made_again(instance):
    both = reported(instance, "neti", "oft")
    one = reported(instance, "neti")
    assert superseded(instance) == []
    nothing = reported(instance)
    assert superseded(instance) == []
    last = reported(instance, "oft")
    assert superseded(instance) == [both, nothing]
    instance.delete_run(both)
    assert instance.get_materialized_partitions(dg.AssetKey("image_grid")) == {"rex|neti", "rex|oft"}
    assert {run.run_id for run in instance.get_runs()} == {one, nothing, last}


def test_a_run_of_verdicts_stays_as_long_as_the_result_that_they_are_of(instance):
    key = dg.AssetKey("image_grid")

    def made(partition: str) -> dg.AssetCheckEvaluation:
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=partition))
        return dg.AssetCheckEvaluation(key, "grid_complete", True, partition=partition)

    verdicts.in_a_run(instance, [made("rex|neti"), made("rex|oft")], "results")
    verdicts.in_a_run(instance, [made("rex|neti")], "results")
    newer, older = (run.run_id for run in instance.get_runs())
    assert superseded(instance) == []
    verdicts.in_a_run(instance, [made("rex|oft")], "results")
    assert superseded(instance) == [older]
    assert newer in {run.run_id for run in instance.get_runs()}
