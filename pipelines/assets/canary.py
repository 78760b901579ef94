"""A few fixed cells run again after an upgrade, and a check that fails where a score left its noise band."""

import dagster as dg

from pipelines.assets import asset_defaults
from pipelines.presentation import metadata
from pipelines.presentation.progress import logged
from pipelines.resources import Workspace

CHECK = "scores_within_noise"


@asset_defaults.asset(
    group="canary",
    layer="measured",
    kinds={"pytorch"},
    pool=asset_defaults.GPU,
    check_specs=[
        dg.AssetCheckSpec(
            CHECK,
            asset="canary",
            description="No score moved since the canary first ran by more than the noise of training, or 0.02 where "
            "`personalize repeat` has not measured that. Right all the same? `personalize canary --accept`.",
        )
    ],
)
def canary(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The cells of params.yaml (automation.canary), trained, sampled and scored again apart from all results."""
    from personalize_core import steps

    store = workspace.store()
    upgraded = steps.upgrades(store) or {}
    result = metadata.result(context, store, steps.run_canary(store, logged(context)))
    moved = steps.moved(store)
    about = {"upgraded": dg.MetadataValue.json(upgraded)}
    verdict = dg.AssetCheckResult(
        check_name=CHECK, passed=not moved, description="; ".join(moved) or None, metadata={"moved": moved, **about}
    )
    return result._replace(metadata={**(result.metadata or {}), **about}, check_results=[verdict])
