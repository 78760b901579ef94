"""What results depend on besides concept images, as assets of its own, so that the UI shows what a change makes stale.

Dagster has one code version for an asset, whatever its partitions; these have a version for each method.
"""

import dagster as dg

from pipelines import asset_defaults
from pipelines.failures import or_skipped
from pipelines.partitions import methods
from pipelines.resources import Workspace

recipe = asset_defaults.source(
    "recipe",
    group="settings",
    kinds={"yaml", "python"},
    partitions_def=methods,
    description="What an artifact depends on besides its concept: the method's section of params.yaml, its source and "
    "that of training, the base model's weights. The sensor `settings` reports a new version when any of it changes, "
    "and the artifacts of this method alone are then out of date.",
)
sampling = asset_defaults.source(
    "sampling",
    group="settings",
    kinds={"yaml", "python"},
    partitions_def=methods,
    description="What a method's images depend on besides its artifact: prompts, sampler, the method's variants, the "
    "source of sampling.",
)
encoders = asset_defaults.source(
    "encoders",
    group="settings",
    kinds={"yaml", "python"},
    description="What scores depend on besides sampled and concept images: the encoders' weights, which variants of a "
    "metric are measured, the source of scoring.",
)
ALL = [recipe, sampling, encoders]


def versions(store) -> dict[tuple[dg.AssetKey, str | None], str]:
    """(asset, method) -> its version, of every method and ablation of params.yaml.

    Raises:
        InputError: params.yaml is damaged, or one of its sections is.
    """
    from personalize_core import steps

    found: dict[tuple[dg.AssetKey, str | None], str] = {(encoders.key, None): steps.scoring_stamp(store)}
    for method in store.params.method_names:
        found[recipe.key, method] = steps.recipe_stamp(store, method)
        found[sampling.key, method] = steps.sampling_stamp(store, method)
    return found


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
    changed = [
        event
        for (key, method), version in versions(workspace.store()).items()
        if _latest(context.instance, key, method)[0] != version
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
    known, number = _latest(instance, spec.key, method)
    if known != version:
        for event in events(spec.key, method, version):
            instance.report_runless_asset_event(event)
        _, number = _latest(instance, spec.key, method)
    name = spec.key.to_user_string()
    tags = {f"dagster/input_data_version/{name}": version, f"dagster/input_event_pointer/{name}": str(number)}
    return result._replace(tags={**(result.tags or {}), **tags})


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> tuple[str | None, int | None]:
    """The version that was reported last, and the number of its event."""
    asked = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition] if partition else None)
    for record in instance.fetch_observations(asked, limit=1).records:
        if record.asset_observation:
            return (record.asset_observation.tags or {}).get("dagster/data_version"), record.storage_id
    return None, None
