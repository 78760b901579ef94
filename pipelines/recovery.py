"""Runs whose process is gone without a word: a power cut took the code server, which would have reported it, along."""

import dagster as dg
import psutil
from dagster._core.storage.runs.sqlite import SqliteRunStorage

WORD = "Its process (pid {pid}) is gone: the machine or Dagster itself was stopped in the middle of it."


def lost_runs(instance: dg.DagsterInstance) -> dict[str, int]:
    """Runs that count as started though their process is gone, with its number.

    Only where all runs are processes of this machine: histories in SQLite say so. A launcher that has runs elsewhere
    looks after them itself.
    """
    if not isinstance(instance.run_storage, SqliteRunStorage) or instance.run_launcher.supports_check_run_worker_health:
        return {}
    started = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    processes = {run.run_id: _process_of(instance, run.run_id) for run in started}
    return {run: process[0] for run, process in processes.items() if process and not _lives(*process)}


def report_lost_runs(instance: dg.DagsterInstance) -> dict[str, int]:
    """Let them count as failed: they give back their place in the pool, and Dagster starts them again."""
    lost = lost_runs(instance)
    for run_id, pid in lost.items():
        run = instance.get_run_by_id(run_id)
        if run and run.status == dg.DagsterRunStatus.STARTED:
            instance.report_run_failed(run, WORD.format(pid=pid))
    return lost


@dg.sensor(
    name="lost_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Finds runs that a power cut, or the end of Dagster itself, left as started. They are reported as "
    "failed and started again; training goes on from its checkpoint.",
)
def lost_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    lost = report_lost_runs(context.instance)
    for run_id, pid in lost.items():
        context.log.warning(f"run {run_id}: {WORD.format(pid=pid)}")
    return dg.SkipReason(
        f"{len(lost)} runs were lost, and start again" if lost else "every started run has its process"
    )


def _process_of(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """The number that the run's process gave when it started, and when that was (Unix time)."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        if event and "pid" in event.engine_event_data.metadata:
            return int(str(event.engine_event_data.metadata["pid"].value)), entry.timestamp
    return None


def _lives(pid: int, spoke: float) -> bool:
    """Is that the process that spoke then? After a restart of the machine another may have its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < spoke + 5  # clocks are read apart
    except psutil.NoSuchProcess:
        return False
