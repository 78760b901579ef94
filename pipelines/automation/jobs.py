"""What one run does: the assets that have partitions in common."""

from __future__ import annotations

import dagster as dg

from pipelines.assets import chain, checks
from pipelines.assets.canary import canary
from pipelines.automation import intake

arrive = dg.define_asset_job(
    "arrive",
    selection=dg.AssetSelection.assets(intake.arrival),
    description="Copy what arrived elsewhere to data/concepts, and check what has changed there.",
)
prepare = dg.define_asset_job(
    "prepare",
    selection=dg.AssetSelection.assets(chain.latents, chain.class_images, chain.reference_scores)
    | dg.AssetSelection.checks(checks.concept_images_usable),
    description="All that the methods need of one concept.",
)
learn = dg.define_asset_job(
    "learn",
    selection=dg.AssetSelection.assets(chain.artifact, chain.image_grid, chain.metrics),
    description="Train one method on one concept, sample with it and score what it sampled, in one process.",
)
compare = dg.define_asset_job(
    "compare",
    selection=dg.AssetSelection.assets(chain.comparison, chain.report),
    description="Put all scores and images that there are side by side, and tell of them in one page.",
)
rerun_canary = dg.define_asset_job(
    "rerun_canary",
    selection=dg.AssetSelection.assets(canary),
    description="Run the cells of the canary again, apart from all results, and compare their scores.",
)


def apart(made: chain.Apart) -> list:
    """The same for a protocol or for another training: its cells, its reference scores, its comparison."""
    whose = f"as the protocol {made.experiment.protocol} says" if made.experiment.protocol else ""
    if made.experiment.repeat:
        whose = f"{whose} for training {made.experiment.repeat} with another seed".strip()
    parts = {
        "learn" if made.learned else "sample": made.cells,
        "prepare": made.preparing,
        "score_external": made.external,
        "compare": made.comparing,
    }
    return [
        dg.define_asset_job(
            made.experiment.named(name),
            selection=dg.AssetSelection.assets(*each),
            description=f"Like the job `{name if name != 'sample' else learn.name}`, {whose}.",
        )
        for name, each in parts.items()
        if each
    ]


ALL = [arrive, prepare, learn, compare, rerun_canary]
