"""A few images by a method as it is, from noise of their own places: for those who look at it, beside its grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.sampling.sampler import batches, initial_noise, make_sampler, sample, step_generators


class How(Protocol):
    """How images are sampled, as `sampling` of params.yaml says."""

    @property
    def sampler(self) -> str: ...
    @property
    def eta(self) -> float: ...
    @property
    def guidance(self) -> float: ...


def images_by(
    method: Method,
    base: BaseModel,
    prompts: Sequence[str],
    places: Sequence[tuple[int, int]],
    how: How,
    steps: int,
    seed: int,
) -> Tensor:
    """(N, H, W, 3) uint8: an image for each prompt, as the method says it; places choose the noise.

    Decoded one by one: four at once would take more of a graphics card than training many a method does.
    """
    parts = []
    for batch in batches(base, len(prompts)):
        here = places[batch]
        sampler = make_sampler(how.sampler, base, eta=how.eta, generators=step_generators(seed, here))
        noise = initial_noise(base, seed, here)
        latents = sample(method, base, prompts[batch], noise, sampler, steps, how.guidance)
        parts += [base.decode(one) for one in latents.split(1)]
    return torch.cat(parts)
