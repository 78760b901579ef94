"""Images made elsewhere in Dagster: a partition for each label, a run for each column that is new or changed."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from personalize_core import steps
from personalize_core.workspace.external_columns import ExternalColumn
from personalize_core.workspace.store import SCORES
from pipelines.assets import external
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace
from tests.report import workspace
from tests.steps.test_external import folder_of
from tests.watching import skipped


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    store = workspace.make(root / "workspace")
    column = ExternalColumn(folder=str(folder_of(root / "out")), source="FLUX.1-dev")
    steps.add_external(store, "flux", "rex", column)
    return store


def tick(store, instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
        result: Any = external.external_columns(context, workspace=Workspace(root=str(store.root)))
    return result


def test_a_column_becomes_a_partition_and_is_asked_for_once(store, instance):
    for concept in workspace.CONCEPTS:
        instance.delete_dynamic_partition(CONCEPT, concept)
    assert not tick(store, instance).run_requests  # its concept has not arrived yet
    instance.add_dynamic_partitions(CONCEPT, list(workspace.CONCEPTS))
    first = tick(store, instance)
    (change,) = list(first.dynamic_partitions_requests or [])
    assert change.partition_keys == ["flux"] and not first.run_requests  # the command may be about to score it
    with store.alone("scores", "flux", "rex"):
        instance.add_dynamic_partitions(external.LABEL, ["flux"])
        assert skipped(tick(store, instance, first.cursor)) == "flux/rex: left to settle"
    second = tick(store, instance, first.cursor)
    (request,) = second.run_requests or []
    assert request.partition_key == dg.MultiPartitionKey({"concept": "rex", "label": "flux"})
    instance.add_dynamic_partitions(external.LABEL, ["gone"])
    later = tick(store, instance, second.cursor)
    assert not later.run_requests
    assert [one.partition_keys for one in later.dynamic_partitions_requests or ()] == [["gone"]]
    store.external("flux", "rex").write_text(store.external("flux", "rex").read_text() + "mention: sks dog\n")
    settling = tick(store, instance, later.cursor)
    assert not settling.run_requests
    assert len(tick(store, instance, settling.cursor).run_requests or ()) == 1


def test_its_asset_scores_it(store, instance):
    instance.add_dynamic_partitions(CONCEPT, list(workspace.CONCEPTS))
    instance.add_dynamic_partitions(external.LABEL, ["flux"])
    for expected in (False, True):
        done = dg.materialize(
            [external.external_metrics],
            partition_key=dg.MultiPartitionKey({"concept": "rex", "label": "flux"}),
            resources={"workspace": Workspace(root=str(store.root))},
            instance=instance,
        )
        (event,) = done.get_asset_materialization_events()
        assert event.materialization.metadata["skipped"].value is expected
    assert (store.scores("flux", "rex") / SCORES).is_file()
