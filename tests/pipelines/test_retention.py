"""Old runs go, and no result with them."""

from __future__ import annotations

import time
from pathlib import Path

import dagster as dg

from personalize_core import steps
from pipelines import assets, retention
from pipelines.resources import Workspace
from tests.in_dagster import materialize, passing
from tests.watching import choose


def prepared(instance: dg.DagsterInstance, root: Path, concept: str) -> str:
    return materialize(instance, root, [assets.latents], concept).run_id


def said(instance: dg.DagsterInstance, root: Path) -> str | None:
    with dg.build_sensor_context(instance=instance) as context:
        skipped = retention.old_runs(context, workspace=Workspace(root=str(root)))
    assert isinstance(skipped, dg.SkipReason)
    return skipped.skip_message


def test_a_run_is_deleted_once_a_later_one_of_its_partition_has_succeeded(instance, monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "encode_images", lambda *arguments: steps.Report("s", False, 1.0, tmp_path))
    monkeypatch.setattr(steps.result_checks, "latents", passing("latents"))
    older, newer, other = (prepared(instance, tmp_path, name) for name in ("dog7", "dog7", "rex"))
    assert retention.superseded(instance, time.time() - 1000) == []
    assert retention.superseded(instance, time.time() + 1) == [older]
    choose(tmp_path)
    assert said(instance, tmp_path) == "all runs are kept (automation.keep_runs)"
    choose(tmp_path, keep_runs=1)
    assert said(instance, tmp_path) == "0 runs were deleted"
    later = time.time() + 2 * retention.DAY
    monkeypatch.setattr(retention.time, "time", lambda: later)
    assert said(instance, tmp_path) == "1 runs were deleted"
    assert {run.run_id for run in instance.get_runs()} == {newer, other}
    assert instance.get_materialized_partitions(assets.latents.key) == {"dog7", "rex"}
