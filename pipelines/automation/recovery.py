"""Runs whose process is gone without a word: a power cut took the code server, which would have reported it, along."""

from pathlib import Path

import dagster as dg

from pipelines import run_locks
from pipelines.resources import Workspace

WORD = "Its {process} is gone: the machine or Dagster itself was stopped in the middle of it."


def report_lost_runs(instance: dg.DagsterInstance, folder: Path) -> dict[str, str]:
    """Let runs without a process count as failed: they leave their place in the pool, and Dagster starts them again.

    Args:
        folder: where the processes of runs hold their locks.

    Returns:
        The runs that were lost, each with what there is to say of it.
    """
    lost = {}
    for run_id, path in run_locks.without_process(folder):
        run = instance.get_run_by_id(run_id)
        if run and run.status == dg.DagsterRunStatus.STARTED:
            lost[run_id] = WORD.format(process=path.read_text())
            instance.report_run_failed(run, lost[run_id])
        elif run and run.is_finished:
            path.unlink(missing_ok=True)
    return lost


@dg.sensor(
    name="lost_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Finds runs that a power cut, or the end of Dagster itself, left as started. They are reported as "
    "failed and started again; training goes on from its checkpoint.",
)
def lost_runs_sensor(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SkipReason:
    lost = report_lost_runs(context.instance, workspace.run_locks())
    for run_id, why in lost.items():
        context.log.warning(f"run {run_id}: {why}")
    return dg.SkipReason(
        f"{len(lost)} runs were lost, and start again" if lost else "every started run has its process"
    )
