"""Old runs are deleted where params.yaml says so: each takes about 126 kB of history, and each night adds some.

A run is kept as long as what it made is the last of its partition: Dagster would forget that there is a result.
"""

import time

import dagster as dg

from pipelines.resources import Workspace

DAY = 86400.0
AT_ONCE = 100  # runs that a tick deletes


def superseded(instance: dg.DagsterInstance, before: float) -> list[str]:
    """The finished runs created before a time (Unix), if a later one of the same job and partition has succeeded."""
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
    return found[::-1]


@dg.sensor(
    name="old_runs",
    minimum_interval_seconds=3600,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Deletes runs that are older than params.yaml says (automation.keep_runs, in days), if one of the same "
    "job and partition has succeeded since. Results and their last materialization stay. It starts no run.",
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
    found = superseded(context.instance, time.time() - days * DAY)[:AT_ONCE]
    for run_id in found:
        context.instance.delete_run(run_id)
    return dg.SkipReason(f"{len(found)} runs were deleted")
