"""Samplers, and what they call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Generator, Tensor

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.methods.interface import Method
from personalize_core.randomness import generator_for
from personalize_core.sampling.frozen import frozen

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, 4, h, w), t (B,)) -> the model's prediction, same shape as x_t. All that a sampler knows of it."""

Sampler = Callable[[Denoiser, Tensor, int], Tensor]
"""(denoiser, pure noise (B, 4, h, w), steps) -> latents, same shape."""

Progress = Callable[[int, int], None]
"""(steps done, steps) -> None"""

SAMPLERS = ("ddim", "dpm-solver++")


def make_sampler(
    name: str,
    base: BaseModel,
    progress: Progress = lambda done, steps: None,
    eta: float = 0.0,
    generators: Sequence[Generator] = (),
) -> Sampler:
    """ "ddim": Song et al. 2021. "dpm-solver++": Lu et al. 2022, second order, multistep.

    Both through diffusers' schedulers, set up from the base model's own, so that the noise schedule and the
    prediction type are the ones it was trained with.

    Args:
        eta: of DDIM, how much new noise each step adds (Song et al. 2021, eq. 16): 0 none, 1 as much as DDPM.
        generators: with eta > 0, one per batch item, from `step_generators`; the sampler then serves that one batch.
    """
    scheduler: Any
    options: dict[str, Any]
    if name == "ddim":
        scheduler, options = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False), {"eta": eta}
    elif name == "dpm-solver++":
        scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config, algorithm_type="dpmsolver++")
        options = {}
    else:
        raise ValueError(f"there is no sampler {name!r}; the samplers are {', '.join(SAMPLERS)}")
    if eta and name != "ddim":
        raise ValueError(f"eta = {eta} is an option of ddim; {name} adds no noise")

    @torch.no_grad()
    def run(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
        for done, t in enumerate(scheduler.timesteps, start=1):
            if eta:
                options["variance_noise"] = _noise_of_items(x, generators)
            x = scheduler.step(denoise(x, t.to(x.device).expand(len(x))), t, x, **options).prev_sample
            progress(done, steps)
        return x

    return run


def _noise_of_items(x: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Of x's shape: the next noise of every item's own generator."""
    noise = [torch.randn(item.shape, generator=generator) for item, generator in zip(x, generators, strict=True)]
    return torch.stack(noise).to(x)


def unwatched(maps: AttentionMaps) -> None:
    """The `look` of those who do not need the attention maps."""


def guided(
    base: BaseModel,
    prompt: Conditioning,
    empty: Conditioning,
    scale: float,
    look: Callable[[AttentionMaps], None] = unwatched,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022), both halves in one U-Net call.

    Args:
        look: gets the attention maps of every call, of 2B batch items, those of the empty prompt first.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        both, maps = TextContext.guidance(empty(t), prompt(t)), AttentionMaps()
        without, with_prompt = base.denoise(x.repeat(2, 1, 1, 1), t.repeat(2), both, maps).chunk(2)
        look(maps)
        return without + scale * (with_prompt - without)

    return denoise


def initial_noise(base: BaseModel, seed: int, images: Sequence[tuple[int, int]]) -> Tensor:
    """(B, 4, h, w): one sample of noise per (prompt index, image index), the same for every concept and method."""
    return torch.stack(
        [
            torch.randn(base.latent_shape, generator=generator_for(seed, "sample", prompt, image))
            for prompt, image in images
        ]
    )


def step_generators(seed: int, images: Sequence[tuple[int, int]]) -> list[Generator]:
    """The sources of noise for the steps of DDIM with eta > 0: one generator per (prompt index, image index)."""
    return [generator_for(seed, "step", prompt, image) for prompt, image in images]


@torch.no_grad()
def sample(
    method: Method,
    base: BaseModel,
    prompts: Sequence[str],
    noise: Tensor,
    sampler: Sampler,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample one image per prompt: latents (B, 4, h, w). The method is frozen meanwhile, as a restored one is.

    Args:
        prompts: B prompts as the method says them (`Method.say`).
        noise: (B, 4, h, w), from `initial_noise`.
    """
    with frozen(method.to(base.device)), method.attach(base):
        denoise = guided(base, method.condition(base, prompts), method.condition(base, [""] * len(prompts)), guidance)
        return sampler(denoise, noise.to(base.device), steps)
