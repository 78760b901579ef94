"""What every asset has that this package defines: a group, a layer and kinds, an owner, and its failures sorted out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import dagster as dg

from pipelines.assets import checks
from pipelines.assets.experiments import USUAL, Experiment
from pipelines.assets.failures import sorted_out
from pipelines.messages.messages import failed_checks_told

OWNERS = ["team:personalize"]
GPU = "gpu"  # the pool that holds one run per graphics card


def asset(
    *,
    group: str,
    layer: str,
    kinds: set[str],
    deps: Sequence[dg.AssetSpec | dg.AssetsDefinition | dg.AssetKey] = (),
    partitions_def: dg.PartitionsDefinition | None = None,
    pool: str | None = None,
    check_specs: Sequence[dg.AssetCheckSpec] = (),
    automation_condition: dg.AutomationCondition | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    experiment: Experiment = USUAL,
) -> Callable[[Callable[..., dg.MaterializeResult]], dg.AssetsDefinition]:
    """An asset that a step of the core makes: `dg.asset`, of a body that calls the step and reports.

    It has the checks that checks.py lists under its name.

    Args:
        group: of the usual experiment; the assets of another one are one group.
        layer: how far it is from the concept images (source, prepared, learned, sampled, measured, compared,
            analysed): a tag, by which the UI and selections find it.
        check_specs: further checks.
        experiment: whose result it is. It gives the prefix of the key.
    """

    def define(body: Callable[..., dg.MaterializeResult]) -> dg.AssetsDefinition:
        own = checks.of(body.__name__, experiment, partitions_def)
        return dg.asset(
            key_prefix=[*experiment.prefix] or None,
            group_name=experiment.group(group),
            tags={"layer": layer},
            kinds=kinds,
            owners=OWNERS,
            deps=deps,
            partitions_def=partitions_def,
            pool=pool,
            check_specs=[*own, *check_specs],
            automation_condition=automation_condition,
            freshness_policy=freshness_policy,
        )(sorted_out(failed_checks_told(body)))

    return define


def source(
    key: dg.CoercibleToAssetKey,
    *,
    group: str,
    kinds: set[str],
    description: str,
    partitions_def: dg.PartitionsDefinition | None = None,
) -> dg.AssetSpec:
    """An asset that no step makes: a sensor reports what became of it."""
    return dg.AssetSpec(
        key,
        description=description,
        group_name=group,
        tags={"layer": "source"},
        kinds=kinds,
        owners=OWNERS,
        partitions_def=partitions_def,
    )
