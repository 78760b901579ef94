"""What the UI is told of a result, whether a run has just made it or a sensor found it: metadata and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dagster as dg

from pipelines.assets import checks
from pipelines.presentation import metadata
from pipelines.presentation.lineage import behind

if TYPE_CHECKING:
    from pathlib import Path

    from personalize_core.steps import Report
    from personalize_core.steps.result_checks import Gate
    from personalize_core.workspace.store import Store


def told(
    context: dg.AssetExecutionContext, store: Store, kind: str, report: Report, concept: str = "", method: str = ""
) -> dg.MaterializeResult:
    """The materialization of what a step has made, with its checks.

    Args:
        method: or the label of an external column.
    """
    more = shown(store, kind, report, concept, method)
    tell = metadata.overview if kind in ("comparison", "report") else metadata.result
    return checks.with_gates(tell(context, store, report, more), gates(store, kind, concept, method))


def inputs_of(store: Store, kind: str, concept: str, method: str) -> dict[str, Path]:
    """What a result is made from, by the names of their assets."""
    found = {
        "latents": lambda: {"concept_images": store.concept_folder(concept)},
        "artifact": lambda: {"latents": store.latents(concept)},
        "image_grid": lambda: {"artifact": store.artifact(method, concept)},
        "metrics": lambda: {
            "concept_images": store.concept_folder(concept),
            "image_grid": store.grid(method, concept),
        },
        "external_metrics": lambda: {"concept_images": store.concept_folder(concept)},
        "reference_scores": lambda: {"concept_images": store.concept_folder(concept)},
        "comparison": lambda: {"metrics": store.sampled / "metrics"},
        "report": lambda: {"comparison": store.comparison()},
    }
    return found[kind]() if kind in found else {}


def shown(
    store: Store, kind: str, report: Report, concept: str = "", method: str = "", most: int | None = None
) -> metadata.Metadata:
    """What is told of a result besides images and numbers.

    Args:
        most: bytes of an input that are read for its DVC hash; of a larger input there is none. None: all are read.
    """
    more = {
        "artifact": metadata.loss_curve,
        "metrics": metadata.scores_by_prompt,
        "external_metrics": metadata.scores_by_prompt,
    }
    own = more[kind](report) if kind in more else {}
    return own | behind(store, report, most, **inputs_of(store, kind, concept, method))


def gates(store: Store, kind: str, concept: str = "", method: str = "") -> list[Gate]:
    """The checks that belong to a result."""
    from personalize_core.steps import result_checks
    from personalize_core.workspace.store import REFERENCES

    if kind == "latents":
        return result_checks.latents(store, concept)
    if kind == "artifact":
        return result_checks.artifact(store, concept, method)
    if kind == "image_grid":
        return result_checks.grid(store, concept, method)
    if kind == "metrics":
        return [
            *result_checks.scores(store, concept, method),
            *result_checks.identity(store, concept, method),
        ]
    if kind == "external_metrics":
        return result_checks.scores(store, concept, method)
    if kind == "reference_scores":
        return result_checks.scores(store, concept, REFERENCES)
    return result_checks.comparison(store) if kind == "comparison" else []
