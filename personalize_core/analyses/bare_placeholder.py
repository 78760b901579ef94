"""The placeholder alone as a prompt, by the base model's own U-Net, with v before and after training.

AttnDreamBooth (Pang et al. 2024), figure 4b: what the embedding itself says, without what was learned in the U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize_core.analyses.findings import Findings
from personalize_core.analyses.inputs import Inputs
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.sampling.sampler import Sampler, guided

TITLE = "The bare placeholder"
HOW = (
    "The placeholder is the whole prompt. The base model's own U-Net samples it with the embedding before training and "
    "after, from the same noise; the last row has also what was learned beside the embedding. Identity is the mean "
    "cosine with the concept images."
)
BEFORE, AFTER, WHOLE = (
    "before training, base U-Net",
    "after training, base U-Net",
    "after training, all that it learned",
)
IMAGES = 4
MEANINGS = {
    "sampled_by": f"'{BEFORE}', '{AFTER}' or '{WHOLE}'",
    "image_index": "which image; equal indices share their noise",
    "identity": "mean cosine with the concept images, by the identity encoder",
}


@torch.no_grad()
def with_base_unet(
    method: Method, base: BaseModel, noise: Tensor, sampler: Sampler, steps: int, guidance: float
) -> Tensor:
    """Latents (B, 4, h, w) of the placeholder alone, with nothing put into the U-Net. noise: (B, 4, h, w)."""
    method.to(base.device).eval()
    condition = method.condition(base, [method.concept.placeholder] * len(noise))
    empty = method.condition(base, [""] * len(noise))
    return sampler(guided(base, condition, empty, guidance), noise.to(base.device), steps)


def save_grid(images: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """A row for each of BEFORE, AFTER and WHOLE; (B, H, W, 3) uint8 each."""
    rows = {name: [[Image.fromarray(one)] for one in sampled] for name, sampled in images.items()}
    count = len(next(iter(images.values())))
    comparison_grid([], rows, [f"noise {n + 1}" for n in range(count)], path, title)


def analyse(inputs: Inputs, findings: Findings) -> None:
    _ = inputs.learned  # not defined where there is none
    how, places = inputs.how, [(0, image) for image in range(IMAGES)]
    noise = inputs.noise(places)
    images = {
        name: inputs.base.decode(
            with_base_unet(method, inputs.base, noise, inputs.sampler(places), how.steps, how.guidance)
        ).numpy()
        for name, method in {BEFORE: inputs.start, AFTER: inputs.trained}.items()
    }
    whole = inputs.sample(inputs.trained, [inputs.concept.placeholder] * len(places), places)
    if (whole != images[AFTER]).any():
        images[WHOLE] = whole
    else:
        findings.absent[WHOLE] = "the method learns nothing beside the embedding: the images are the same"
    rows = []
    for name, sampled in images.items():
        identities = inputs.identities(inputs.features_of(inputs.identity, sampled))
        findings.metrics[f"identity, {name}"] = float(identities.mean())
        rows += [{"sampled_by": name, "image_index": n, "identity": float(x)} for n, x in enumerate(identities)]
    findings.table("bare_placeholder.parquet", rows, MEANINGS, "every image's identity")
    caption = f"the prompt '{inputs.concept.placeholder}' alone, with the embedding before and after training"
    save_grid(images, findings.image("bare_placeholder.png", caption), f"'{inputs.concept.placeholder}'")
