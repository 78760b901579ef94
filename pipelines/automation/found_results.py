"""Results that no run of Dagster made are shown all the same: those of the command line and of DVC."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import dagster as dg

from pipelines.assets import chain, checks, outcomes, settings
from pipelines.assets.experiments import USUAL, Experiment, experiments
from pipelines.assets.external import LABEL
from pipelines.assets.failures import or_skipped
from pipelines.automation import verdicts
from pipelines.automation.requests import under_way
from pipelines.partitions import CONCEPT, METHOD, METHODS
from pipelines.presentation import history, metadata
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.steps import Cell, Place, Report
    from personalize_core.workspace.store import Store

BUDGET = 8.0  # seconds of a tick that go into reading results; the next tick goes on
SETTLING = 600.0  # seconds in which the files beside a manifest may still arrive, as from DVC's cache
LARGE = 2**26  # bytes; a larger result is not checked here, nor a larger input hashed: a run does both
COMPARED = ("metrics", "reference_scores", "external_metrics", "image_grid")
UNKNOWN = "other than now"  # the version of a setting that a result was made with, where it is not today's
NEVER = -1  # the number of an event before all others


class Setting(NamedTuple):
    """Of a result: the asset, its partition, and its version today; None where what it is made of is damaged."""

    key: dg.AssetKey
    method: str | None
    version: str | None


@dataclass(frozen=True)
class Found:
    """A result that has been read, and is about to be reported."""

    experiment: Experiment
    place: "Place"
    event: dg.AssetMaterialization
    evaluations: list[dg.AssetCheckEvaluation]
    setting: Setting | None  # what it is made with
    current: bool  # of what `personalize plan` looks at; others count as current


@dg.sensor(
    name="results",
    minimum_interval_seconds=20,
    default_status=dg.DefaultSensorStatus.RUNNING,
    tags={"stage": "arrival"},
    description="Reports results in data/ that the command line or DVC made: materializations with their images, "
    "scores, data version and checks. It looks at the manifests' times and reads only those that have changed. It "
    "makes no result. New verdicts on a result that was reported before are events of a short run, `verdicts`. What a "
    "run is working on is left to that run.",
)
@or_skipped
def results(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult:
    """The cursor names a file in data/.work that says which manifests have been read; without it, all are read again.

    That costs time and changes nothing: what Dagster's history says already is not reported a second time.
    """
    from personalize_core.errors import listed
    from personalize_core.files.atomic import read_record, write_json
    from personalize_core.files.snapshot import snapshot

    store = workspace.store()
    cursor = context.cursor or uuid.uuid4().hex[:12]
    notes = store.work("reported", f"{cursor}.json")
    seen: dict[str, str] = read_record(notes)
    concepts, labels = (context.instance.get_dynamic_partitions(dimension) for dimension in (CONCEPT, LABEL))
    there: dict[str, str] = {}
    changed: list[tuple[Experiment, Place]] = []
    unknown: set[str] = set()  # ablations that are partitions once definitions are loaded again
    for experiment in [USUAL, *experiments(store.root)]:
        for place, word in _results_there(experiment, workspace, concepts).items():
            if place.label and place.label not in labels:
                continue  # the sensor `external_columns` makes it a partition
            if place.method and place.method not in METHODS:
                unknown.add(place.method)
                continue
            name = _name(experiment, place)
            there[name] = word
            if seen.get(name) != word:
                changed.append((experiment, place))
    with snapshot():  # of what results are made with
        found, damaged, left = _read(context, workspace, changed)
    _report(context.instance, found)
    noted = {name: word for name, word in seen.items() if there.get(name) == word}
    handled = {_name(*each) for each in changed} - left
    noted |= {name: there[name] for name in handled}
    if noted != seen or not context.cursor:
        write_json(notes, noted)
    for sentence in damaged:
        context.log.warning(sentence)
    reported = f"{len(found)} results are reported" if found else "no result that is not known already"
    waiting = f"; {len(left)} wait" if left else ""
    waiting += f"; {listed(sorted(unknown))}: load definitions again" if unknown else ""
    return dg.SensorResult(skip_reason=f"{reported}{waiting}", cursor=cursor)


def _results_there(experiment: Experiment, workspace: Workspace, concepts: Sequence[str]) -> "dict[Place, str]":
    from personalize_core import steps

    store = experiment.store(workspace)
    if not experiment.prefix:
        return steps.results_there(store, concepts)
    kinds = ["image_grid", "metrics"]
    if experiment.repeat and not experiment.protocol:
        kinds.append("artifact")
    if not experiment.repeat:
        kinds += ["reference_scores", "external_metrics", "comparison", "report"]
    return steps.results_there(store, concepts, kinds)


def _read(
    context: dg.SensorEvaluationContext, workspace: Workspace, changed: "list[tuple[Experiment, Place]]"
) -> tuple[list[Found], list[str], set[str]]:
    """What is to be reported, what cannot be, and what is left to a later tick: a run is at it, or time is up."""
    from personalize_core import steps
    from personalize_core.errors import InputError

    until = time.monotonic() + BUDGET
    busy = under_way(context.instance) if changed else set()
    found: list[Found] = []
    damaged: list[str] = []
    left: set[str] = set()
    plans: dict[tuple[Experiment, str], list[Cell]] = {}
    for experiment, place in changed:
        if _is_busy(place, busy) or time.monotonic() > until:
            left.add(_name(experiment, place))
            continue
        store = experiment.store(workspace)
        try:
            report = steps.found_report(store, place)
            last = history.last(context.instance, experiment.key(place.kind), _partition(place))
            if history.data_version(last) != str(report.stamp):
                concept = place.concept or ""
                cells: list[Cell] = []
                if place.method:
                    if (experiment, concept) not in plans:
                        plans[experiment, concept] = steps.plan(store, [concept])
                    cells = plans[experiment, concept]
                found.append(_told(store, experiment, place, report, cells))
        except InputError as error:
            damaged.append(str(error))
            if steps.seconds_since(store, place) < SETTLING:
                left.add(_name(experiment, place))
        except OSError:  # it is being replaced
            left.add(_name(experiment, place))
    return found, damaged, left


def made(
    instance: dg.DagsterInstance, workspace: Workspace, kind: str, concept: str, method: str, report: "Report"
) -> Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """What a run tells of a result that it has just made, where it is not the run of an asset.

    The materialization must be stored before the next event is asked for, as when an op yields it.
    """
    from personalize_core import steps

    store, place = workspace.store(), steps.Place(kind, concept, method)
    found = _told(store, USUAL, place, report, steps.plan(store, [concept], [method]), thorough=True)
    about = {
        **found.event.metadata,
        "seconds": dg.MetadataValue.float(round(report.seconds, 2)),
        "skipped": dg.MetadataValue.bool(report.skipped),
    }
    yield _tagged(instance, found)._replace(description=None, metadata=about)
    record = history.last(instance, found.event.asset_key, found.event.partition)
    yield from (verdicts.aimed(evaluation, record) for evaluation in found.evaluations if record)


def _told(
    store: "Store",
    experiment: Experiment,
    place: "Place",
    report: "Report",
    cells: "Sequence[Cell]",
    thorough: bool = False,
) -> Found:
    from personalize_core import steps

    concept, column, key = place.concept or "", place.column, experiment.key(place.kind)
    small = thorough or steps.bytes_of(store, place) <= LARGE
    why = steps.why_out_of_date(store, place, cells) if column else None
    setting = _setting(store, experiment, place, current=not why)
    more = outcomes.shown(store, place.kind, report, concept, column, None if thorough else LARGE)
    if place.kind in ("comparison", "report"):
        report = metadata.of_overview(report)
    about = metadata.of(store, report, more)
    del about["seconds"], about["skipped"]  # of a step, and none has run
    if why:
        about["out_of_date"] = dg.MetadataValue.text(why)
    event = dg.AssetMaterialization(
        key,
        description="Found in data/; made by the command line or DVC.",
        metadata=about,
        partition=_partition(place),
        tags={
            "dagster/data_version": str(report.stamp),
            "dagster/data_version_is_user_provided": "true",
            "dagster/code_version": "unknown",  # without one, Dagster takes no notice of the versions of inputs
        },
    )
    gates = outcomes.gates(store, place.kind, concept, column) if small and place.kind != "latents" else []
    return Found(experiment, place, event, checks.evaluations(key, _partition(place), gates), setting, not why)


def _report(instance: dg.DagsterInstance, found: Sequence[Found]) -> None:
    """In quick succession: whoever watches for changed scores sees the comparison of them as well.

    Args:
        found: inputs before what is made from them.
    """
    again: list[dg.AssetCheckEvaluation] = []
    try:
        for each in found:
            instance.report_runless_asset_event(_tagged(instance, each))
            record = history.last(instance, each.event.asset_key, each.event.partition)
            aimed = [verdicts.aimed(evaluation, record) for evaluation in each.evaluations if record]
            again += verdicts.without_run(instance, aimed)
    finally:  # a result that the history holds is not reported again, nor are its verdicts
        verdicts.in_a_run(instance, again, results.name)


def _tagged(instance: dg.DagsterInstance, found: Found) -> dg.AssetMaterialization:
    """The materialization, with the tags that one of a run has."""
    tags = {**(found.event.tags or {}), **_dimensions(found.place), **dict(_inputs(instance, found))}
    return found.event._replace(tags=tags)


def _setting(store: "Store", experiment: Experiment, place: "Place", current: bool) -> Setting | None:
    """The setting that a result depends on, if it depends on one.

    Raises:
        InputError: params.yaml or the protocol is damaged, and the result counts as current.
    """
    from personalize_core import steps
    from personalize_core.errors import InputError

    made_by, method = settings.of(experiment), place.method or ""
    scoring = made_by.encoders.key, None, lambda: steps.scoring_stamp(store)
    depends = {
        "artifact": (made_by.recipe.key, method, lambda: steps.recipe_stamp(store, method)),
        "image_grid": (made_by.sampling.key, method, lambda: steps.sampling_stamp(store, method)),
        "metrics": scoring,
        "external_metrics": scoring,
    }.get(place.kind)
    if depends is None:
        return None
    key, whose, version = depends
    try:
        return Setting(key, whose, version())
    except InputError:
        if current:
            raise
        return Setting(key, whose, None)


def _inputs(instance: dg.DagsterInstance, found: Found) -> Iterator[tuple[str, str]]:
    """What the result depends on, as a run would have noted it: the last versions that have been reported.

    A result that is out of date has been made with other settings than today's, and is marked as such.
    """
    if found.setting:
        key, method, version = found.setting
        today = settings.depends_on(instance, key, method, version) if version else {}
        yield from (today if found.current else settings.input_tags(key, UNKNOWN, NEVER)).items()
    for key in _upstream(found.experiment, found.place.kind):
        images = key == chain.concept_images.key  # Dagster reads what is not its own from observations
        records = (instance.fetch_observations if images else instance.fetch_materializations)(key, limit=1).records
        version = history.data_version(records[0]) if records else None
        yield from settings.input_tags(key, version or "INITIAL", records[0].storage_id if records else None).items()


def _upstream(experiment: Experiment, kind: str) -> list[dg.AssetKey]:
    """The assets that one depends on, without settings."""
    trained = Experiment(None, experiment.repeat)
    images, artifact = chain.concept_images.key, trained.key("artifact")
    return {
        "latents": [images],
        "class_images": [images],
        "artifact": [USUAL.key("latents"), USUAL.key("class_images")],
        "image_grid": [artifact],
        "reference_scores": [images],
        "external_metrics": [images],
        "metrics": [images, experiment.key("image_grid")],
        "comparison": [experiment.key(name) for name in COMPARED],
        "report": [experiment.key("comparison"), artifact, experiment.key("image_grid")],
    }[kind]


def _partition(place: "Place") -> str | None:
    both = _both(place)
    return dg.MultiPartitionKey(both) if both else place.concept


def _both(place: "Place") -> dict[str, str]:
    """The partition's dimensions, if there are two."""
    return {CONCEPT: str(place.concept), METHOD if place.method else LABEL: place.column} if place.column else {}


def _dimensions(place: "Place") -> dict[str, str]:
    """What the event of a run says besides the partition itself."""
    return {f"dagster/partition/{dimension}": name for dimension, name in _both(place).items()}


def _is_busy(place: "Place", busy: set[str]) -> bool:
    """Is a run at work on it, which will report it itself? What is made of all waits until nothing is under way."""
    return bool(busy) if place.concept is None else bool(busy & {str(_partition(place)), place.concept})


def _name(experiment: Experiment, place: "Place") -> str:
    return "/".join([*experiment.prefix, place.name])
