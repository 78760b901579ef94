"""Did training teach the model these concept images? The diffusion loss on a batch that stays the same.

A training log cannot tell: its noise and timesteps change with every step. Here every concept image is noised to the
same timesteps with the same noise before training and after, so that the two losses of an item are a pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method
from personalize_core.randomness import generator_for
from personalize_core.sampling.frozen import frozen

TIMESTEPS = tuple(range(50, 1000, 100))


def timesteps_of(method: Method) -> tuple[int, ...]:
    """`TIMESTEPS` for a method that trains on all timesteps; else as many, of those that it trains on."""
    first = min((stage.min_timestep for stage in method.stages()), default=0)
    return tuple(first + (1000 - first) * t // 1000 for t in TIMESTEPS)


@torch.no_grad()
def fixed_batch_losses(method: Method, base: BaseModel, images: ConceptLatents, seed: int) -> Tensor:
    """(concept images, timesteps): mean squared error of the U-Net's prediction, under "a photo of" the concept."""
    losses, timesteps = [], timesteps_of(method)
    with frozen(method.to(base.device)), method.attach(base):
        prompts = [method.say("a photo of a {}")] * len(timesteps)
        t = torch.tensor(timesteps)
        context = method.condition(base, prompts)(t.to(base.device))
        for index, views in enumerate(images.concept):
            mean = views[0, 0]  # the mode of the posterior, of the first view
            noise = torch.randn((len(t), *mean.shape), generator=generator_for(seed, "fixed batch", index))
            latents = mean.expand_as(noise)
            x_t = base.scheduler.add_noise(latents, noise, t)
            if images.sizes is not None:
                told = images.sizes[index][:1].expand(len(t), -1).to(base.device)
                context = replace(context, sizes=told)
            prediction = base.denoise(x_t.to(base.device), t.to(base.device), context).cpu()
            losses.append((prediction - base.target(latents, noise, t)).pow(2).mean(dim=(1, 2, 3)))
    return torch.stack(losses)


def improvement(before: Tensor, after: Tensor, seed: int) -> dict[str, Any]:
    """The two mean losses, and how much each item's loss fell, with a 95 % bootstrap interval over the items."""
    from scipy import stats

    fell = (before - after).flatten().double().numpy()
    result = stats.bootstrap((fell,), np.mean, n_resamples=10_000, method="percentile", rng=seed)
    return {
        "before": before.double().mean().item(),
        "after": after.double().mean().item(),
        "fell_by": float(fell.mean()),
        "interval_95": [float(result.confidence_interval.low), float(result.confidence_interval.high)],
        "rows": int(fell.size),
    }
