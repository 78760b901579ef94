"""Ticks of the sensor `concept_folder` over one workspace, as the daemon would run them."""

from __future__ import annotations

import datetime
from pathlib import Path

import dagster as dg
import yaml
from PIL import Image

from pipelines.automation import arrival, intake, jobs
from pipelines.partitions import CONCEPT
from pipelines.resources import Workspace


def evening(
    instance: dg.DagsterInstance, workspace: Workspace, when: datetime.datetime
) -> dg.ScheduleEvaluationContext:
    """What a schedule is evaluated with; to be closed by `with`.

    The workspace is among its resources: a schedule that is called with it makes another context, which nobody closes,
    and which changes Dagster's current instance whenever it is collected.
    """
    from pipelines.definitions import defs

    return dg.build_schedule_context(
        instance=instance,
        resources={"workspace": workspace},
        scheduled_execution_time=when,
        repository_def=defs.get_repository_def(),
    )


class Watch:
    """What a tick returns is done as the daemon does it: partitions, events, cursor. Runs are only remembered."""

    def __init__(self, instance: dg.DagsterInstance, root: Path) -> None:
        self.instance, self.root, self.cursor = instance, root, None

    def tick(self) -> dg.SensorResult:
        """One look, the run of the asset `arrival` that it asks for, and the look after that."""
        first = self.look()
        arrivals = [request for request in first.run_requests or [] if request.job_name == jobs.arrive.name]
        if not arrivals:
            return first
        for request in arrivals:
            resources = {"workspace": Workspace(root=str(self.root))}
            dg.materialize([intake.arrival], resources=resources, instance=self.instance, run_config=request.run_config)
        others = [request for request in first.run_requests or [] if request not in arrivals]
        second = self.look()
        assert jobs.arrive.name not in [request.job_name for request in second.run_requests or []], "asked twice"
        events = [*first.asset_events, *second.asset_events]
        return second._replace(asset_events=events, run_requests=[*others, *(second.run_requests or [])])

    def look(self) -> dg.SensorResult:
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            result = arrival.concept_folder(context, workspace=Workspace(root=str(self.root)))
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        for request in result.dynamic_partitions_requests or []:
            if isinstance(request, dg.AddDynamicPartitionsRequest):
                self.instance.add_dynamic_partitions(CONCEPT, list(request.partition_keys))
            else:
                for key in request.partition_keys:
                    self.instance.delete_dynamic_partition(CONCEPT, key)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        return result

    def twice(self) -> dg.SensorResult:
        """A folder counts once it has been seen unchanged."""
        self.tick()
        return self.tick()

    def known(self) -> set[str]:
        return set(self.instance.get_dynamic_partitions(CONCEPT))

    def verdict(self) -> dg.AssetCheckEvaluation | None:
        """What the UI shows of the check."""
        key = dg.AssetCheckKey(dg.AssetKey("concept_images"), arrival.CHECK)
        record = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
        return record.event.dagster_event.asset_check_evaluation_data if record and record.event else None  # type: ignore


def reported(result: dg.SensorResult) -> list[str | None]:
    return [event.partition for event in result.asset_events if isinstance(event, dg.AssetMaterialization)]


def complaints(result: dg.SensorResult) -> dict[str | None, str | None]:
    """Folder -> why it cannot be used, as it stands among the asset's events."""
    with_reason = [e for e in result.asset_events if isinstance(e, dg.AssetObservation) and e.description]
    return {event.partition: event.description for event in with_reason}


def skipped(result: dg.SensorResult) -> str | None:
    return result.skip_reason.skip_message if isinstance(result.skip_reason, dg.SkipReason) else result.skip_reason


def concept(parent: Path, name: str, shade: int = 0) -> Path:
    """A folder as a person would put it there."""
    folder = parent / name
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), (shade, 0, 0)).save(folder / "00.png")
    (folder / "concept.yaml").write_text(f'placeholder: "<{name}>"\nclass_noun: dog\n')
    return folder


def choose(root: Path, **automation) -> None:
    """params.yaml with this section, and the others as the project ships them."""
    shipped = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
    (root / "params.yaml").write_text(yaml.safe_dump(shipped | {"automation": automation}))
