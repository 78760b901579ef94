"""Which runs are asked for: one for each concept that lacks what all methods share, one for each stale cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from pipelines.automation import jobs
from pipelines.partitions import CONCEPT, METHOD, METHODS

if TYPE_CHECKING:
    from personalize_core.steps import Cell
    from personalize_core.workspace.store import Store

THEN = "personalize/then"  # on a run that prepares a concept: the job that follows for what is stale of it
LEARN_CONCEPT = "learn_concept"  # the job that makes all stale cells of a concept (together.py)
FIRST = {"dagster/priority": "10"}  # before training, where both wait


def preparation(concept: str, occasion: str) -> dg.RunRequest:
    """Prepare a concept, and then train what is stale of it."""
    tags = {THEN: jobs.learn.name, **FIRST}
    return dg.RunRequest(f"{concept}, {occasion}", job_name=jobs.prepare.name, partition_key=concept, tags=tags)


def training(cell: Cell, occasion: str) -> dg.RunRequest:
    """Train, sample and score one cell; what is current of these is kept."""
    key = dg.MultiPartitionKey({CONCEPT: cell.concept, METHOD: cell.method})
    tags = {"personalize/why": cell.why[:500]}
    return dg.RunRequest(f"{key}, {occasion}", job_name=jobs.learn.name, partition_key=key, tags=tags)


def trainings(cells: Sequence[Cell], occasion: str, job: str) -> list[dg.RunRequest]:
    """One run for each cell, or one for each concept, which finds its stale cells itself.

    Args:
        job: `learn` or `learn_concept`.
    """
    if job == jobs.learn.name:
        return [training(cell, occasion) for cell in cells]
    whys: dict[str, list[str]] = {}
    for cell in cells:
        whys.setdefault(cell.concept, []).append(f"{cell.method}: {cell.why}")
    return [
        dg.RunRequest(
            f"{concept}, {occasion}",
            job_name=job,
            partition_key=concept,
            tags={"personalize/why": "; ".join(why)[:500]},
        )
        for concept, why in whys.items()
    ]


def stale(instance: dg.DagsterInstance, store: Store, concepts: Sequence[str] | None = None) -> list[Cell]:
    """The stale cells of concepts that are partitions and can be used, without those that a run is under way for.

    Raises:
        InputError: params.yaml is damaged.
    """
    asked = dg.RunsFilter(job_name=LEARN_CONCEPT, statuses=[*_UNFINISHED])
    together = {run.tags.get("dagster/partition") for run in instance.get_runs(asked)}
    return [cell for cell in without_run(instance, store, concepts) if cell.concept not in together]


def without_run(instance: dg.DagsterInstance, store: Store, concepts: Sequence[str] | None = None) -> list[Cell]:
    """The same, of which one may be of a concept whose stale cells one run makes."""
    from personalize_core import steps

    # before the plan: of a run that ends in between, it sees the result
    busy = under_way(
        instance, concepts and [f"{name}|{each}" for name in concepts for each in store.params.method_names]
    )
    cells = steps.plan(store, usable(instance, store) if concepts is None else concepts)
    return [_with_a_partition(cell) for cell in cells if f"{cell.concept}|{cell.method}" not in busy]


def _with_a_partition(cell: Cell) -> Cell:
    """The cell, without a run to ask for if Dagster does not know its ablation yet."""
    if cell.method in METHODS or not cell.possible:
        return cell
    return cell.impossible(
        f"{cell.method} has been written into params.yaml since definitions were loaded; load them again: "
        "Deployment, Code locations, Reload"
    )


def usable(instance: dg.DagsterInstance, store: Store) -> list[str]:
    from personalize_core.workspace import arrival

    found = arrival.look(store)
    known = sorted(instance.get_dynamic_partitions(CONCEPT))
    return [name for name in known if name in found and not found[name].problem]


def unfinished(instance: dg.DagsterInstance, partitions: Sequence[str] | None = None) -> Sequence[dg.DagsterRun]:
    """All runs that wait or run, or those of a few partitions: of a thousand, all take a while."""
    tags = {"dagster/partition": [*partitions]} if partitions else None
    return instance.get_runs(dg.RunsFilter(statuses=[*_UNFINISHED], tags=tags))


def under_way(instance: dg.DagsterInstance, partitions: Sequence[str] | None = None) -> set[str]:
    """The partitions of these runs; a run without a partition counts as ""."""
    return {run.tags.get("dagster/partition", "") for run in unfinished(instance, partitions)}


def is_under_way(instance: dg.DagsterInstance, job: str) -> bool:
    """Does a run of this job wait or run?"""
    return bool(instance.get_run_records(dg.RunsFilter(job_name=job, statuses=[*_UNFINISHED]), limit=1))


_UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)
