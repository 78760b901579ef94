"""What is trained at night, and what follows of itself.

The core says what is stale (`personalize plan` prints the same list). A concept that lacks what all methods share is
prepared first, and its cells follow when that has succeeded; so one broken concept stops no other. The comparison
follows when no cell is waiting or running any more.
"""

from pathlib import Path

import dagster as dg

from personalize_core.workspace.params import Params
from pipelines.assets.failures import or_skipped
from pipelines.automation import jobs
from pipelines.automation.requests import THEN, preparation, stale, trainings, under_way, usable
from pipelines.automation.together import learn_concept
from pipelines.resources import Workspace

# Of params.yaml, as definitions are loaded; the defaults where they are loaded elsewhere.
AUTOMATION = Params.read_automation(Path("params.yaml"))
TRAINS = learn_concept if AUTOMATION.together else jobs.learn


def due(context: dg.ScheduleEvaluationContext) -> str:
    """The time that a tick was for. It stands in the keys of its runs: a tick that is evaluated twice asks once."""
    return f"{context.scheduled_execution_time:%Y-%m-%d %H:%M}"


@dg.schedule(
    job=TRAINS,
    cron_schedule=AUTOMATION.nightly,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    tags={"stage": "training"},
    description="Asks for one run for every concept and method that is not up to date, or with automation.together for "
    "every concept that has such a method: a new concept, a changed concept image, recipe, base model or source. The "
    "methods are those listed in params.yaml. `personalize plan` prints the same list.",
)
@or_skipped
def nightly(context: dg.ScheduleEvaluationContext, workspace: Workspace) -> list[dg.RunRequest] | dg.SkipReason:
    from personalize_core import steps

    store = workspace.store()
    cells = stale(context.instance, store)
    ready = {name for name in {cell.concept for cell in cells} if steps.is_prepared(store, name)}
    refused = [f"{cell.method} on {cell.concept}: {cell.why}" for cell in cells if not cell.possible]
    for reason in [*refused, *filter(None, [steps.earlier_version_notice(cells)])]:
        context.log.warning(reason)
    wanted = [cell for cell in cells if cell.possible and cell.concept in ready]
    requests = trainings(wanted, due(context), TRAINS.name)
    waiting = len({cell.concept for cell in cells if cell.possible} - ready)
    if requests:
        return requests
    return dg.SkipReason(
        "; ".join([*([f"{waiting} concepts are prepared first"] if waiting else []), *refused])
        or "everything is up to date, or under way"
    )


@dg.schedule(
    job=jobs.prepare,
    cron_schedule=AUTOMATION.nightly,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    tags={"stage": "training"},
    description="Asks for one run for every concept that lacks latents, class images or the scores of its concept "
    "images; its stale methods are trained when that has succeeded.",
)
@or_skipped
def nightly_preparation(
    context: dg.ScheduleEvaluationContext, workspace: Workspace
) -> list[dg.RunRequest] | dg.SkipReason:
    from personalize_core import steps

    store, busy = workspace.store(), under_way(context.instance)
    names = [name for name in usable(context.instance, store) if name not in busy]
    requests = [preparation(name, due(context)) for name in names if not steps.is_prepared(store, name)]
    return requests or dg.SkipReason("every concept is prepared, or is being prepared")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    monitored_jobs=[jobs.prepare],
    request_job=TRAINS,
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="When a concept has been prepared by the schedule or on its arrival, asks for one run for each of its "
    "methods that is not up to date. A preparation that a person started is followed by nothing.",
)
@or_skipped
def training_follows(context: dg.RunStatusSensorContext, workspace: Workspace) -> list[dg.RunRequest] | dg.SkipReason:
    from personalize_core import steps

    run = context.dagster_run
    concept = run.tags.get("dagster/partition")
    if run.tags.get(THEN) != jobs.learn.name or not concept:
        return dg.SkipReason("a person started it")
    cells = stale(context.instance, workspace.store(), [concept])
    refused = [f"{cell.method}: {cell.why}" for cell in cells if not cell.possible]
    for reason in [*refused, *filter(None, [steps.earlier_version_notice(cells)])]:
        context.log.warning(reason)
    requests = trainings([cell for cell in cells if cell.possible], run.run_id, TRAINS.name)
    return requests or dg.SkipReason("; ".join(refused) or f"nothing of {concept} is stale")


comparison_follows = dg.AutomationConditionSensorDefinition(
    "comparison_follows",
    target=dg.AssetSelection.all(),  # those with a condition: comparison and report, also of protocols
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Compares and reports anew when scores have changed and no cell is waiting or running any more.",
)


@dg.schedule(
    job=jobs.rerun_canary,
    cron_schedule="0 1 * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    tags={"stage": "canary"},
    description="After an upgrade of any installed package, runs the cells of params.yaml (automation.canary) again.",
)
@or_skipped
def canary_after_upgrade(context: dg.ScheduleEvaluationContext, workspace: Workspace) -> dg.RunRequest | dg.SkipReason:
    from personalize_core import steps

    store = workspace.store()
    if not steps.canary_cells(store):
        return dg.SkipReason("params.yaml names no cells for the canary (automation.canary)")
    why = steps.why_canary(steps.upgrades(store))
    if not why:
        return dg.SkipReason("no package is another one than when the canary ran last")
    return dg.RunRequest(due(context), tags={"personalize/why": why[:500]})
