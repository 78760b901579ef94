"""Where a method that attends to concept images finds the concept in them, layer by layer.

ViCo (Hao et al. 2023) shows such masks: what lies outside of them, its blocks do not see. Where the concept came with
masks of its own, they say how much of what is seen is the concept: in an image with several objects, whether it is the
right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import Inputs
from personalize_core.concepts.images import views_of
from personalize_core.concepts.masks import Mask, own_masks
from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.interface import MasksReferences
from personalize_core.report.figures.image_grids import comparison_grid

TITLE = "Object masks"
TEMPLATE, TIMESTEP = "a photo of a {}", 500
HOW = (
    f"The concept images as the method attends to them under '{TEMPLATE}' at timestep {TIMESTEP}, decoded from its "
    "latents; what a layer's mask leaves out is dark. The share is that of the locations inside. Where the concept has "
    "masks of its own, a mask that knows nothing of it lies on it by the concept's share of the image."
)
MOST = 6  # concept images in the grid
DARK = 0.2  # of their brightness
MEANINGS = {
    "layer": "the transformer whose map of the placeholder parts concept and background",
    "concept_image": "which of the concept images, from 0; the image calls it by the next number",
    "share": "of the locations that the mask keeps",
    "concept_share": "of the image that shows the concept, by its own mask; null without one",
    "on_concept": "of the locations that the mask keeps, the share on the concept; null without its own mask",
    "of_concept": "of the concept, the share that the mask keeps; null without its own mask, or if that is empty",
}
COMPARED = ("concept_share", "on_concept", "of_concept")  # of these, with a concept's own masks
METRICS = {"share": "share inside", "on_concept": "share on the concept", "of_concept": "share of the concept"}
NO_MASKS = "the concept has no masks of its own, which say what in its images is the concept"
CHANGED = "concept images or description are others by now than were trained on, or nothing says which these were"


def darkened(image: np.ndarray, mask: Tensor) -> Image.Image:
    """image: (H, W, 3) uint8. mask: (h*w) bool, of a square."""
    side = int(mask.numel() ** 0.5)
    enlarged = F.interpolate(mask.float().view(1, 1, side, side), size=image.shape[:2], mode="nearest")[0, 0]
    kept = enlarged.cpu().numpy()[..., None]
    return Image.fromarray((image * (DARK + (1 - DARK) * kept)).round().astype(np.uint8))


def shown_in(own: Mask, prepared: Preprocessing, size: int) -> Tensor:
    """(size, size) in [0, 1]: the own mask of a concept image, prepared as that image is for training."""
    image = Image.fromarray(own.astype(np.uint8) * 255).convert("RGB")
    view = views_of(prepared, image, size)[0].convert("L")
    return torch.from_numpy(np.asarray(view) / np.float32(255))


def overlap(mask: Tensor, shown: Tensor) -> dict[str, float | None]:
    """The last three of MEANINGS.

    Args:
        mask: (h*w) bool, of a square.
        shown: (H, W), how much of each pixel shows the concept.
    """
    side = int(mask.numel() ** 0.5)
    concept = F.adaptive_avg_pool2d(shown[None], side).flatten()
    kept, common = mask.float().sum().item(), concept[mask.cpu()].sum().item()
    return {
        "concept_share": concept.mean().item(),
        "on_concept": common / kept if kept else None,
        "of_concept": common / concept.sum().item() if concept.any() else None,
    }


def analyse(inputs: Inputs, findings: Findings) -> None:
    method, base = inputs.trained, inputs.base
    if not isinstance(method, MasksReferences):
        raise NotDefined("the method attends to no concept image")
    references, masks = method.object_masks(base, method.say(TEMPLATE), TIMESTEP)
    if not masks:
        raise NotDefined("as it was trained, the method masks no concept image")
    images = base.decode(references[:MOST]).numpy()
    own = own_masks(inputs.concept_images)
    if own is None or not inputs.trained_on_these:
        findings.absent["share on the concept"] = CHANGED if own else NO_MASKS
        own = None
    rows: list[dict[str, Any]] = []
    for number in range(len(references)):
        shown = None if own is None else shown_in(own[number], method.config.preprocessing, images.shape[1])
        for layer, found in masks.items():
            row = {"layer": layer, "concept_image": number, "share": float(found[number].float().mean())}
            compared = dict.fromkeys(COMPARED) if shown is None else overlap(found[number], shown)
            rows.append(row | compared)
    for layer in masks:
        of_layer = [row for row in rows if row["layer"] == layer]
        for name, words in METRICS.items():
            values = [row[name] for row in of_layer if row[name] is not None]
            if values:
                findings.metrics[f"{words}, {layer}"] = float(np.mean(values))
    findings.table("object_masks.parquet", rows, MEANINGS, "the share of every mask, and how much of it is the concept")
    panels = {
        f"concept image {number + 1}": [
            [Image.fromarray(image)],
            *([darkened(image, masks[layer][number])] for layer in masks),
        ]
        for number, image in enumerate(images)
    }
    words = "the concept images, and what the mask of each layer, in the table's order, keeps of them"
    path = findings.image("object_masks.png", words)
    comparison_grid([], panels, ["as attended to", *_heads(masks)], path, f"Where is {inputs.concept.name}?")


def _heads(masks: Mapping[str, Tensor]) -> list[str]:
    """Short enough for a column: a layer's number in the table's order, and the size of its mask."""
    sides = [int(found.shape[-1] ** 0.5) for found in masks.values()]
    return [f"layer {number}, {side} x {side}" for number, side in enumerate(sides, start=1)]
