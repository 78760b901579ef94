"""Old runs are deleted where params.yaml says so: each takes about 126 kB of history, and each night adds some.

A run is kept as long as it holds the last materialization of any asset and partition: Dagster would forget that there
is a result. A later run of its job and partition may have made others: `learn_concept` makes only the stale methods of
a concept.
"""

import time
from collections.abc import Iterator
from itertools import islice

import dagster as dg

from pipelines.presentation import history
from pipelines.resources import Workspace

DAY = 86400.0
AT_ONCE = 100  # runs that a tick deletes


def superseded(instance: dg.DagsterInstance, before: float) -> Iterator[str]:
    """The finished runs created before a time (Unix) that nothing would be lost with; the oldest first.

    A later run of the same job and partition has succeeded, and what the run reported has been reported again since.
    """
    done, found = set(), []
    cursor = None
    while records := instance.get_run_records(limit=500, cursor=cursor):  # the newest first
        for record in records:
            run = record.dagster_run
            what = (run.job_name, run.tags.get("dagster/partition"))
            if run.is_finished and what in done and record.create_timestamp.timestamp() < before:
                found.append(run.run_id)
            if run.status == dg.DagsterRunStatus.SUCCESS:
                done.add(what)
        cursor = records[-1].dagster_run.run_id
    return (run_id for run_id in reversed(found) if _is_replaced(instance, run_id))


def _is_replaced(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Has every asset and partition that the run materialized been materialized since?

    A run that only checked results holds verdicts on materializations; each of them must have been followed by another.
    """
    events = _events(instance, run_id, dg.DagsterEventType.ASSET_MATERIALIZATION)
    events = events or _events(instance, run_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    for (key, partition), number in events.items():
        last = history.last(instance, key, partition)
        if last is None or last.run_id == run_id or last.storage_id < number:
            return False
    return True


def _events(
    instance: dg.DagsterInstance, run_id: str, kind: dg.DagsterEventType
) -> dict[tuple[dg.AssetKey, str | None], int]:
    """(asset, partition) -> the number of the last such event of a run."""
    found: dict[tuple[dg.AssetKey, str | None], int] = {}
    cursor, more = None, True
    while more:
        page = instance.get_records_for_run(run_id, cursor, kind, limit=500)
        for record in page.records:
            event = record.event_log_entry.dagster_event
            about = event.event_specific_data if event else None
            if isinstance(about, dg.AssetCheckEvaluation):
                found[about.asset_key, about.partition] = record.storage_id
            elif event and event.asset_key:
                found[event.asset_key, event.partition] = record.storage_id
        cursor, more = page.cursor, page.has_more
    return found


@dg.sensor(
    name="old_runs",
    minimum_interval_seconds=3600,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Deletes runs that are older than params.yaml says (automation.keep_runs, in days), if one of the same "
    "job and partition has succeeded since, and all that they materialized has been materialized since. Results and "
    "their last materialization stay. It starts no run.",
)
def old_runs(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SkipReason:
    from personalize_core.errors import InputError
    from personalize_core.workspace.params import Params

    try:
        days = Params.read_automation(workspace.store().root / "params.yaml").keep_runs
    except InputError as error:
        return dg.SkipReason(str(error))
    if days is None:
        return dg.SkipReason("all runs are kept (automation.keep_runs)")
    found = list(islice(superseded(context.instance, time.time() - days * DAY), AT_ONCE))
    for run_id in found:
        context.instance.delete_run(run_id)
    return dg.SkipReason(f"{len(found)} runs were deleted")
