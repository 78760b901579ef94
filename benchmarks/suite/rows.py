"""The batch items of training steps: random latents of a concept, and what a method makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ZOOMS, ConceptLatents
from personalize_core.methods.interface import Method
from personalize_core.randomness import generator_for
from personalize_core.training.loop import noisy_rows

SEED = 0
IMAGES = 5  # of the concept, and of its class noun


@dataclass(frozen=True)
class Rows:
    """The batch items of one step, on the CPU."""

    latents: Tensor  # (B, 4, h, w), scaled as the U-Net expects
    noise: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) timesteps
    prompts: Sequence[str]  # B of them, with the concept's placeholder
    weight: Tensor  # (B, 1, 1, 1), or (B, 1, h, w): see Batch


def random_latents(base: BaseModel) -> ConceptLatents:
    """Latents of a concept that has as many views as any method wants."""
    generator = generator_for(SEED, "latents")

    def moments() -> Tensor:
        mean = torch.randn((ZOOMS, *base.latent_shape), generator=generator)
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return ConceptLatents([moments() for _ in range(IMAGES)], [moments() for _ in range(IMAGES)])


def rows_of(method: Method, base: BaseModel, images: ConceptLatents, steps: int) -> list[Rows]:
    """The batch items of the first steps of the first stage; the base model predicts noise."""
    stage, found = method.stages()[0], []
    for index in range(steps):
        rows = noisy_rows(method, base, images, stage, SEED, index)
        batch = rows.batch
        found.append(Rows(batch.latents, rows.target.cpu(), rows.t.cpu(), batch.prompts, batch.weight.cpu()))
    return found
