"""The concept images that images are compared with: all of them, or those held out beside those trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from personalize_core.metrics.tables import ALL_IMAGES, HELD_OUT, TRAINED_ON

ALONE = "there is one concept image, and none to compare it with"


def reference_sets(concept_images: Sequence[Path], held_out: Sequence[Path] | None) -> dict[str, Sequence[Path]]:
    """Of tables' references, those that images are compared with.

    Args:
        concept_images: those that were trained on.
        held_out: those that were not; None: images are not held out here at all.
    """
    if held_out is None:
        return {ALL_IMAGES: concept_images}
    return ({HELD_OUT: held_out} if held_out else {}) | {TRAINED_ON: concept_images}


def why_none_held_out(concept_images: Sequence[Path], held_out: Sequence[Path] | None) -> str | None:
    """Why there are no scores with held-out images, where there might be; else None."""
    if held_out is None or held_out:
        return None
    return f"of {len(concept_images)} concept images none is held out, and all are trained on"
