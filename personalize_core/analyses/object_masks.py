"""Where a method that attends to concept images finds the concept in them, layer by layer.

ViCo (Hao et al. 2023) shows such masks: what lies outside of them, its blocks do not see.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import Inputs
from personalize_core.methods.interface import MasksReferences
from personalize_core.report.figures.image_grids import comparison_grid

TITLE = "Object masks"
TEMPLATE, TIMESTEP = "a photo of a {}", 500
HOW = (
    f"The concept images as the method attends to them under '{TEMPLATE}' at timestep {TIMESTEP}, decoded from its "
    "latents; what a layer's mask leaves out is dark. The share is that of the locations inside."
)
MOST = 6  # concept images in the grid
DARK = 0.2  # of their brightness
MEANINGS = {
    "layer": "the transformer whose map of the placeholder parts concept and background",
    "concept_image": "which of the concept images, from 0",
    "share": "of the locations that the mask keeps",
}


def darkened(image: np.ndarray, mask: Tensor) -> Image.Image:
    """image: (H, W, 3) uint8. mask: (h*w) bool, of a square."""
    side = int(mask.numel() ** 0.5)
    enlarged = F.interpolate(mask.float().view(1, 1, side, side), size=image.shape[:2], mode="nearest")[0, 0]
    kept = enlarged.cpu().numpy()[..., None]
    return Image.fromarray((image * (DARK + (1 - DARK) * kept)).round().astype(np.uint8))


def analyse(inputs: Inputs, findings: Findings) -> None:
    method, base = inputs.trained, inputs.base
    if not isinstance(method, MasksReferences):
        raise NotDefined("the method attends to no concept image")
    references, masks = method.object_masks(base, inputs.concept.placeholder.join(TEMPLATE.split("{}")), TIMESTEP)
    if not masks:
        raise NotDefined("as it was trained, the method masks no concept image")
    rows = [
        {"layer": layer, "concept_image": number, "share": float(mask.float().mean())}
        for layer, found in masks.items()
        for number, mask in enumerate(found)
    ]
    findings.metrics = {f"share inside, {layer}": float(found.float().mean()) for layer, found in masks.items()}
    findings.table("object_masks.parquet", rows, MEANINGS, "the share of every mask")
    images = base.decode(references[:MOST]).numpy()
    shown = {
        f"concept image {number}": [
            [Image.fromarray(image)],
            *([darkened(image, masks[layer][number])] for layer in masks),
        ]
        for number, image in enumerate(images)
    }
    path = findings.image("object_masks.png", "the concept images, and what each layer's mask keeps of them")
    comparison_grid([], shown, ["as attended to", *masks], path, f"Where is {inputs.concept.name}?")
