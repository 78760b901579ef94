"""What must hold before the next step is worth its time. The core looks (steps/result_checks.py); this tells Dagster.

A check of one partition is part of its asset: where it fails, the run stops before the next asset, and the event says
what was measured. A serious failure blocks; a warning is shown and stops nothing.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipelines.assets.experiments import USUAL, Experiment
from pipelines.partitions import concepts
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.steps.result_checks import Gate

BLOCKING, WARNING = True, False
OF_ASSETS: dict[str, dict[str, tuple[bool, str]]] = {  # asset -> check -> can it block, and what it says
    "latents": {
        "latents_finite": (BLOCKING, "Every number of every latent is finite."),
        "latents_decode": (
            BLOCKING,
            "Decoded, the latents match the concept images they were encoded from, to 15 dB. Blocks where they belong "
            "to other images or are damaged; warns where the base model's autoencoder cannot reproduce such images.",
        ),
    },
    "artifact": {
        "loss_finite": (BLOCKING, "Every loss of every training step is finite."),
        "loss_falls": (
            BLOCKING,
            "The loss on a batch that stays the same is lower after training, with 95 % confidence; else it warns. "
            "Blocks where it has grown by half: training has diverged.",
        ),
        "artifact_restores": (
            BLOCKING,
            "A fresh process read the artifact from disk and sampled the same as the trainer; its files are unchanged.",
        ),
    },
    "image_grid": {
        "grid_complete": (BLOCKING, "Every prompt was sampled by every variant, and every image can be read."),
        "grid_not_constant": (BLOCKING, "No image is of one colour."),
    },
    "metrics": {
        "scores_in_range": (BLOCKING, "Cosines lie in [-1, 1], scaled ones in [0, 2.5]."),
        "scores_complete": (BLOCKING, "Every image has every score, or a reason why it has none."),
        "identity_above_base_model": (
            WARNING,
            "The images are more like the concept (DINO) than those of the base model, which has never seen it.",
        ),
    },
    "reference_scores": {
        "scores_in_range": (BLOCKING, "Cosines lie in [-1, 1]."),
        "scores_complete": (BLOCKING, "Every concept image has every score, or a reason why it has none."),
    },
    "external_metrics": {
        "scores_in_range": (BLOCKING, "Cosines lie in [-1, 1], scaled ones in [0, 2.5]."),
        "scores_complete": (BLOCKING, "Every image has every score, or a reason why it has none."),
    },
    "comparison": {
        "comparison_complete": (WARNING, "Every concept and method of the experiment has been scored."),
    },
}


def of(
    asset: str, experiment: Experiment = USUAL, partitions_def: dg.PartitionsDefinition | None = None
) -> list[dg.AssetCheckSpec]:
    """The checks that are part of an asset, if it has any, one verdict for each of its partitions."""
    with warnings.catch_warnings():
        # Dagster calls partitions of a check a preview. Without them its page would show the last cell's verdict alone.
        warnings.filterwarnings("ignore", message=".*partitions_def.*")
        return [
            dg.AssetCheckSpec(
                name, asset=experiment.key(asset), blocking=blocking, description=said, partitions_def=partitions_def
            )
            for name, (blocking, said) in OF_ASSETS.get(asset, {}).items()
        ]


def with_gates(result: dg.MaterializeResult, gates: "Sequence[Gate]") -> dg.MaterializeResult:
    """The materialization, with what the checks of the results found."""
    found = [_result(gate) for gate in gates]
    return result._replace(check_results=[*(result.check_results or []), *found])


def evaluations(key: dg.AssetKey, partition: str | None, gates: "Sequence[Gate]") -> list[dg.AssetCheckEvaluation]:
    """The same of a result that no run has made. It blocks nothing: what follows has been made already."""
    return [
        dg.AssetCheckEvaluation(key, gate.name, blocking=False, partition=partition, **_about(gate)) for gate in gates
    ]


def _result(gate: "Gate") -> dg.AssetCheckResult:
    return dg.AssetCheckResult(check_name=gate.name, **_about(gate))


def _about(gate: "Gate") -> dict[str, Any]:
    return {
        "passed": gate.passed,
        "severity": dg.AssetCheckSeverity.ERROR if gate.serious else dg.AssetCheckSeverity.WARN,
        "description": gate.said,
        "metadata": {name: dg.MetadataValue.float(value) for name, value in gate.metrics.items()},
    }


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*partitions_def.*")

    @dg.asset_check(
        asset="concept_images",
        blocking=True,
        partitions_def=concepts,
        description="Every concept image can be read, and there are as many as the variants in params.yaml use. Warns "
        "below three.",
    )
    def concept_images_usable(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        from personalize_core import steps

        (gate,) = steps.result_checks.concept_images(workspace.store(), context.partition_key)
        return _result(gate)


ALL = [concept_images_usable]
