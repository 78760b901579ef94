"""Verdicts of checks on results that no run has made.

Dagster 1.13 stores one evaluation without a run for each check and partition, and refuses the next (the unique index of
its table `asset_check_executions`). So the first is reported without a run, and the later ones of a tick together are
the events of one short run, in the process of the sensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

NO_RUN = ""  # the run of an event that belongs to none
JOB = "verdicts"


def aimed(evaluation: dg.AssetCheckEvaluation, record: dg.EventLogRecord) -> dg.AssetCheckEvaluation:
    """The evaluation of just this materialization; the UI shows those of an earlier one as missing."""
    # The type of the pointer has no public name. Its stored form is stable, and reading such forms is public.
    stored = {"storage_id": record.storage_id, "run_id": record.run_id, "timestamp": record.timestamp}
    target: Any = dg.deserialize_value(
        json.dumps({"__class__": "AssetCheckEvaluationTargetMaterializationData", **stored})
    )
    return dg.AssetCheckEvaluation(
        evaluation.asset_key,
        evaluation.check_name,
        evaluation.passed,
        metadata=evaluation.metadata,
        target_materialization_data=target,
        severity=evaluation.severity,
        description=evaluation.description,
        blocking=evaluation.blocking,
        partition=evaluation.partition,
    )


def without_run(
    instance: dg.DagsterInstance, evaluations: Sequence[dg.AssetCheckEvaluation]
) -> list[dg.AssetCheckEvaluation]:
    """Add the verdicts on one materialization to Dagster's history, if they are the first of their asset and partition.

    Returns:
        those that need a run, as Dagster would refuse them.
    """
    if evaluations and not _is_first(instance, evaluations[0]):
        return [*evaluations]
    for evaluation in evaluations:
        instance.report_runless_asset_event(evaluation)
    return []


def _is_first(instance: dg.DagsterInstance, evaluation: dg.AssetCheckEvaluation) -> bool:
    """Has nothing been reported of the partition without a run, but the materialization that was evaluated?"""
    if evaluation.partition is None:
        return True  # of these Dagster stores any number
    cursor = None
    while True:
        asked = dg.AssetRecordsFilter(evaluation.asset_key, asset_partitions=[evaluation.partition])
        page = instance.fetch_materializations(asked, limit=100, cursor=cursor)
        for record in page.records:
            target = evaluation.target_materialization_data
            if record.run_id == NO_RUN and not (target and target.storage_id == record.storage_id):
                return False
        if not page.has_more:
            return True
        cursor = page.cursor


def in_a_run(instance: dg.DagsterInstance, evaluations: Sequence[dg.AssetCheckEvaluation], sensor: str) -> None:
    """Add the verdicts, in place of those that stand there of the same checks and partitions. Without any, no run.

    Args:
        sensor: who reports them, as the UI says of the run.
    """
    if not evaluations:
        return

    @dg.op(name=JOB, out=dg.Out(dg.Nothing))
    def verdicts() -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        yield from evaluations
        yield dg.Output(None)

    @dg.job(
        name=JOB,
        executor_def=dg.in_process_executor,
        description="Verdicts of checks on results that the command line or DVC has made again. It computes nothing.",
    )
    def job() -> None:
        verdicts()

    job.execute_in_process(instance=instance, tags={"dagster/sensor_name": sensor})
