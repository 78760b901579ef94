"""What results depend on besides concept images, as assets of its own, so that the UI shows what a change makes stale.

Dagster has one code version for an asset, whatever its partitions; these have a version for each method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import dagster as dg

from pipelines.assets import asset_defaults
from pipelines.assets.experiments import USUAL as THE_USUAL
from pipelines.assets.experiments import Experiment, experiments
from pipelines.assets.failures import or_skipped
from pipelines.partitions import METHODS, methods
from pipelines.presentation import history
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store


@dataclass(frozen=True)
class Settings:
    """The settings that the results of one experiment depend on."""

    experiment: Experiment
    recipe: dg.AssetSpec  # no protocol has one of its own
    sampling: dg.AssetSpec
    encoders: dg.AssetSpec

    @property
    def all(self) -> list[dg.AssetSpec]:
        own = [self.sampling, self.encoders]
        return own if self.experiment.protocol else [self.recipe, *own]

    def versions(self, store: "Store") -> dict[tuple[dg.AssetKey, str | None], Callable[[], str]]:
        """(asset, method) -> what gives its version, of every method and ablation of params.yaml that is a partition.

        Raises:
            InputError: params.yaml or the protocol is damaged. What a method's section lacks, its version raises.
        """
        from personalize_core import steps

        found: dict[tuple[dg.AssetKey, str | None], Callable[[], str]] = {}
        found[self.encoders.key, None] = partial(steps.scoring_stamp, store)
        for method in (each for each in store.params.method_names if each in METHODS):
            if self.recipe in self.all:
                found[self.recipe.key, method] = partial(steps.recipe_stamp, store, method)
            found[self.sampling.key, method] = partial(steps.sampling_stamp, store, method)
        return found


_recipe = asset_defaults.source(
    "recipe",
    group="settings",
    kinds={"yaml", "python"},
    partitions_def=methods,
    description="What an artifact depends on besides its concept: the method's section of params.yaml, its source and "
    "that of training, the base model's weights. The sensor `settings` reports a new version when any of it changes, "
    "and the artifacts of this method alone are then out of date.",
)


@cache
def of(experiment: Experiment) -> Settings:
    """A protocol says itself how is sampled and scored; further trainings are sampled and scored as the first is."""
    if experiment.repeat:
        return of(Experiment(experiment.protocol))
    sampling = asset_defaults.source(
        experiment.key("sampling"),
        group=experiment.group("settings"),
        kinds={"yaml", "python"},
        partitions_def=methods,
        description="What a method's images depend on besides its artifact: prompts, sampler, the method's variants, "
        "the source of sampling.",
    )
    encoders = asset_defaults.source(
        experiment.key("encoders"),
        group=experiment.group("settings"),
        kinds={"yaml", "python"},
        description="What scores depend on besides sampled and concept images: the encoders' weights, which variants "
        "of a metric are measured, the source of scoring.",
    )
    return Settings(experiment, _recipe, sampling, encoders)


USUAL = of(THE_USUAL)


@dg.sensor(
    name="settings",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    tags={"stage": "arrival"},
    description="Reports a new version of `recipe`, `sampling` or `encoders` where params.yaml, the sources, the base "
    "model or the encoders are others now. It starts no run.",
)
@or_skipped
def settings(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult:
    from personalize_core.errors import InputError
    from personalize_core.files.snapshot import snapshot

    store = workspace.store()
    protocols = [each for each in experiments(store.root) if not each.repeat]
    now: dict[tuple[dg.AssetKey, str | None], str] = {}
    wrong: list[str] = []
    with snapshot():
        asked = USUAL.versions(store)
        for experiment in protocols:
            try:
                asked |= of(experiment).versions(experiment.store(workspace))
            except InputError as error:
                wrong.append(str(error))
        for place, version in asked.items():
            try:
                now[place] = version()
            except InputError as error:  # a protocol or a section that is damaged hides no change of the others
                wrong.append(str(error))
    for sentence in dict.fromkeys(wrong):
        context.log.warning(sentence)
    changed = [
        event
        for (key, method), version in now.items()
        if latest(context.instance, key, method)[0] != version
        for event in events(key, method, version)
    ]
    if not changed:
        return dg.SensorResult(skip_reason="params.yaml and the sources are as they were")
    return dg.SensorResult(asset_events=changed)


def events(
    key: dg.AssetKey, partition: str | None, version: str, metadata: dict | None = None
) -> list[dg.AssetObservation | dg.AssetMaterialization]:
    """A new version of an asset that Dagster does not make itself.

    Dagster 1.13 reads the version of a partition from observations, and that of an asset without partitions, and which
    partitions there are, from materializations. The observation comes first: a run remembers the last event, and what
    is observed behind it counts as new.
    """
    tags = {"dagster/data_version": version}
    about = {"partition": partition, "metadata": metadata, "tags": tags}
    return [dg.AssetObservation(key, **about), dg.AssetMaterialization(key, **about)]


def made_with(
    instance: dg.DagsterInstance, result: dg.MaterializeResult, spec: dg.AssetSpec, method: str | None, version: str
) -> dg.MaterializeResult:
    """The result, saying which version of the settings it was made with.

    By itself Dagster would say the last that was reported, and the sensor may not have seen the newest yet. There is no
    other way to tell it than these tags (tests/pipelines/test_dagster.py).
    """
    return result._replace(tags={**(result.tags or {}), **depends_on(instance, spec.key, method, version)})


def depends_on(instance: dg.DagsterInstance, key: dg.AssetKey, method: str | None, version: str) -> dict[str, str]:
    """The tags of a materialization that was made with this version of a setting, which is reported if it is new."""
    known, number = latest(instance, key, method)
    if known != version:
        for event in events(key, method, version):
            instance.report_runless_asset_event(event)
        _, number = latest(instance, key, method)
    return input_tags(key, version, number)


def input_tags(key: dg.AssetKey, version: str, number: int | None) -> dict[str, str]:
    """How Dagster notes the version of an input, and the event that told of it: it has no call for that."""
    name = key.to_user_string()
    return {
        f"dagster/input_data_version/{name}": version,
        f"dagster/input_event_pointer/{name}": "NULL" if number is None else str(number),
    }


def latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> tuple[str | None, int | None]:
    """The version that was reported last, and the number of its event."""
    asked = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition] if partition else None)
    records = instance.fetch_observations(asked, limit=1).records
    return (history.data_version(records[0]), records[0].storage_id) if records else (None, None)
