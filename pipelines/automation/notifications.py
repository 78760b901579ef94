"""Somebody is told: of a failed run, a failed check, a refused folder, and every morning of what the night has brought.

What is told is written down (messages/delivery.py) and delivered by a sensor, so that no run waits for a mail server.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipelines.messages import delivery, messages
from pipelines.messages.delivery import Message
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.workspace.automation import Notify
    from personalize_core.workspace.store import Store

MOST_LINES = 20  # of each part of a digest
SINCE = timedelta(hours=24)  # what a digest covers


@dg.run_failure_sensor(
    name="failed_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Writes down a message for each run that failed (params.yaml, automation.notify), unless its failed "
    "check has been told. It starts no run.",
)
def failed_runs(context: dg.RunFailureSensorContext, workspace: Workspace) -> None:
    store, run = workspace.store(), context.dagster_run
    if delivery.is_written(store, f"check-{run.run_id}"):
        return
    concept, method = _cell(run.tags)
    again = " It is started again." if run.tags.get("dagster/will_retry") == "true" else ""
    title = f"{run.job_name}{messages.about(concept, method)} failed"
    sentence = f"{_why(context)}{again}"

    def message(link: str) -> Message:
        page = messages.link_of_run(link, run.run_id)
        return Message(f"run-{run.run_id}", "failed_run", title, sentence, page, concept, method)

    messages.tell(store, message, context.log)


@dg.sensor(
    name="notifications",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Delivers what was written down for those whom params.yaml names (automation.notify), again after "
    "30 s, a minute and so on up to an hour where a server does not take it, for about a day. It also writes down the "
    "digest of the night. It starts no run.",
)
def notifications(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult | dg.SkipReason:
    """The cursor is the day of the last digest."""
    from personalize_core.errors import InputError

    store, now = workspace.store(), datetime.now().astimezone()
    today = f"{now:%Y-%m-%d}"
    last = context.cursor or today
    try:
        done, problems = delivery.deliver(store)
        said = [f"{done} messages delivered" if done else "no message was due", *problems]
        for problem in problems:
            context.log.warning(problem)
        if digest_is_due(delivery.configured(store), last, now):
            said += ["the digest is written"] * write_digest(context.instance, store, now)
            last = today
    except InputError as error:
        return dg.SkipReason(str(error))
    return dg.SensorResult(skip_reason="; ".join(said), cursor=last)


def digest_is_due(notify: "Notify", last: str, now: datetime) -> bool:
    """Once a day, at the time of params.yaml or as soon after as this runs.

    Args:
        last: the day of the last digest, or of the first start.
    """
    if notify.digest is None or not notify.channels:
        return False
    return last < f"{now:%Y-%m-%d}" and f"{now:%H:%M}" >= notify.digest


def write_digest(instance: dg.DagsterInstance, store: "Store", now: datetime) -> bool:
    """One message about the last 24 hours; False where this day's was written before."""
    title, text = summed_up(instance, store, now)
    link = f"{delivery.configured(store).link.rstrip('/')}/runs"
    return delivery.write(store, Message(f"digest-{now:%Y-%m-%d}", "digest", title, text, link))


def summed_up(instance: dg.DagsterInstance, store: "Store", when: datetime) -> tuple[str, str]:
    """Title and text of a digest.

    Raises:
        InputError: params.yaml is damaged.
    """
    from personalize_core import steps
    from personalize_core.workspace import arrival
    from pipelines.automation.requests import unfinished, usable

    since = (when.astimezone(UTC) - SINCE).timestamp()
    trained = [_label(record) for record in _made(instance, "artifact", since)]
    better, worse = [], []
    for record in _made(instance, "metrics", since):
        for change, sentence in _changes(instance, store, record):
            (better if change > 0 else worse).append(sentence)
    asked = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=datetime.fromtimestamp(since, UTC))
    failed = [_of_run(record.dagster_run) for record in instance.get_run_records(asked)]
    runs = unfinished(instance)
    busy = {run.tags.get("dagster/partition") for run in runs}
    waiting = [
        f"{cell.method} on {cell.concept}: {cell.why}"
        for cell in steps.plan(store, usable(instance, store))
        if f"{cell.concept}|{cell.method}" not in busy
    ]
    refusals = [f"{name}: {why}" for name, why in arrival.refusals(store).items()]
    parts = [
        ("Trained", trained),
        ("Better beyond noise", better),
        ("Worse beyond noise", worse),
        ("Failed", failed),
        ("Under way", sorted(map(_of_run, runs))),
        ("Waiting", waiting),
        ("Refused", refusals),
    ]
    title = f"{len(trained)} trained, {len(better)} better, {len(worse)} worse, {len(failed)} failed"
    return title, "\n".join(_part(name, lines) for name, lines in parts if lines) or "Nothing happened, nothing waits."


def _made(instance: dg.DagsterInstance, asset: str, since: float) -> Iterator[dg.EventLogRecord]:
    """The materializations that did work, the newest of each partition, since a time (Unix)."""
    seen, cursor = set(), None
    asked = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), after_timestamp=since)
    while True:
        page = instance.fetch_materializations(asked, limit=500, cursor=cursor)
        for record in page.records:
            event = record.asset_materialization
            if event and event.partition not in seen and not _metadata(record).get("skipped", True):
                seen.add(event.partition)
                yield record
        if not page.has_more:
            return
        cursor = page.cursor


def _changes(instance: dg.DagsterInstance, store: "Store", record: dg.EventLogRecord) -> Iterator[tuple[float, str]]:
    """The scores of a cell that differ from those before by more than the noise of training."""
    from personalize_core import steps
    from personalize_core.metrics.tables import METRICS

    event = record.asset_materialization
    if event is None or event.partition is None:
        return
    asked = dg.AssetRecordsFilter(
        asset_key=event.asset_key, asset_partitions=[event.partition], before_storage_id=record.storage_id
    )
    (before, *_) = [*instance.fetch_materializations(asked, limit=1).records, None]
    if before is None:
        return
    old, new, (concept, _, method) = _metadata(before), _metadata(record), event.partition.partition("|")
    for name in sorted(old.keys() & new.keys()):
        variant, _, metric = name.rpartition(".")
        if metric not in METRICS or metric.endswith("_scaled"):  # the same once more, times 2.5
            continue
        least, _ = steps.noise_band(store, concept, variant or method, metric)
        change = new[name] - old[name]
        if abs(change) > least:
            yield change, f"{_label(record)}: {name} {old[name]:.3f} -> {new[name]:.3f}"


def _metadata(record: dg.EventLogRecord) -> dict[str, Any]:
    event = record.asset_materialization
    return {name: each.value for name, each in event.metadata.items()} if event else {}


def _label(record: dg.EventLogRecord) -> str:
    event = record.asset_materialization
    concept, _, method = ((event and event.partition) or "").partition("|")
    return f"{method} on {concept}"


def _part(name: str, lines: list[str]) -> str:
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([f"{name} ({len(lines)}):", *(f"- {line}" for line in [*lines[:MOST_LINES], *more])])


def _of_run(run: dg.DagsterRun) -> str:
    """What a run does, and on what."""
    return f"{run.job_name}{messages.about(*_cell(run.tags))}"


def _cell(tags: Any) -> tuple[str | None, str | None]:
    """Concept and method of a run's partition."""
    concept, _, method = tags.get("dagster/partition", "").partition("|")
    return concept or None, method or None


def _why(context: dg.RunFailureSensorContext) -> str:
    """The sentences of the steps that failed, else that of the run."""
    sentences = [sentence for event in context.get_step_failure_events() if (sentence := _sentence(event))]
    return " ".join(sentences) or context.failure_event.message or "See the run."


def _sentence(event: dg.DagsterEvent) -> str | None:
    failure = event.step_failure_data
    if failure.user_failure_data and failure.user_failure_data.description:
        return failure.user_failure_data.description
    error = failure.error
    while error and error.cause:
        error = error.cause
    return error.message.strip().splitlines()[0] if error else None
