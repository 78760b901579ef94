"""Samplers, and what they call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Generator, Tensor

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext, distinct_rows
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

MOST_AT_ONCE = 16  # images; the miniature samples more of them no faster each
LATENTS_AT_ONCE = 16 * 64 * 64  # locations of latents: 16 images of 512 pixels


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
        # The scheduler computes its factors on the CPU. The U-Net's copy crosses to a card once, not in every step.
        timesteps = scheduler.timesteps.to(x.device)
        for done, t in enumerate(scheduler.timesteps, start=1):
            if eta:
                options["variance_noise"] = _noise_of_items(x, generators)
            x = scheduler.step(denoise(x, timesteps[done - 1].expand(len(x))), t, x, **options).prev_sample
            progress(done, steps)
        return x

    return run


def _noise_of_items(x: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Of x's shape: the next noise of every item's own generator."""
    noise = [torch.randn(item.shape, generator=generator) for item, generator in zip(x, generators, strict=True)]
    return torch.stack(noise).to(x)


def guided(
    base: BaseModel,
    prompt: Conditioning,
    empty: Conditioning,
    scale: float,
    look: Callable[[AttentionMaps], None] | None = None,
    prompts: Sequence[str] | None = None,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022), both halves in one U-Net call.

    Args:
        look: gets the attention maps of every call, of 2B batch items, those of the empty prompt first. Without it
            none are kept.
        prompts: what `prompt` says, for methods that do something once for equal ones.
    """
    distinct = distinct_rows([""] * len(prompts) + [*prompts], base.device) if prompts else None
    known: tuple[TextContext, TextContext, TextContext] | None = None

    def halves(t: Tensor) -> TextContext:
        """Put together once where the conditionings give the same text in every step, as most do."""
        nonlocal known
        without, said = empty(t), prompt(t)
        if known is None or known[0] is not without or known[1] is not said:
            known = without, said, TextContext.guidance(without, said, distinct)
        return known[2]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        maps = AttentionMaps(latest_only=look is None)
        without, with_prompt = base.denoise(x.repeat(2, 1, 1, 1), t.repeat(2), halves(t), maps).chunk(2)
        if look:
            look(maps)
        return without + scale * (with_prompt - without)

    return denoise


@runtime_checkable
class Guides(Protocol):
    """A method that is not guided as all others are."""

    def guided(
        self,
        base: BaseModel,
        prompts: Sequence[str],
        scale: float,
        look: Callable[[AttentionMaps], None] | None = None,
    ) -> Denoiser:
        """In place of the function of that name, where this method is attached."""
        ...


def denoiser(
    method: Method,
    base: BaseModel,
    prompts: Sequence[str],
    scale: float,
    look: Callable[[AttentionMaps], None] | None = None,
) -> Denoiser:
    """How an attached method predicts these prompts under guidance; see `guided`."""
    if isinstance(method, Guides):
        return method.guided(base, prompts, scale, look)
    said, empty = method.condition(base, prompts), method.condition(base, [""] * len(prompts))
    return guided(base, said, empty, scale, look, prompts)


def at_once(base: BaseModel) -> int:
    """How many images to sample at once, at most; their size alone decides, so that the bytes are always the same."""
    _, height, width = base.latent_shape
    return max(1, min(MOST_AT_ONCE, LATENTS_AT_ONCE // (height * width)))


def batches(base: BaseModel, images: int) -> list[slice]:
    """Which of so many images to sample together: as few parts as possible, of sizes as equal as possible."""
    parts = -(-images // at_once(base))
    ends = [images * part // parts for part in range(parts + 1)] if parts else []
    return [slice(start, end) for start, end in pairwise(ends)]


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


@contextmanager
def ready(method: Method, base: BaseModel) -> Iterator[None]:
    """Within it the method is attached, and frozen, as a restored one is: for `denoised`."""
    with torch.no_grad(), frozen(method.to(base.device)), method.attach(base):
        yield


@torch.no_grad()
def denoised(
    method: Method,
    base: BaseModel,
    prompts: Sequence[str],
    noise: Tensor,
    sampler: Sampler,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample one image per prompt by a method that is `ready`: latents (B, 4, h, w).

    Args:
        prompts: B prompts as the method says them (`Method.say`).
        noise: (B, 4, h, w), from `initial_noise`.
    """
    return sampler(denoiser(method, base, prompts, guidance), noise.to(base.device), steps)


def sample(
    method: Method,
    base: BaseModel,
    prompts: Sequence[str],
    noise: Tensor,
    sampler: Sampler,
    steps: int,
    guidance: float,
) -> Tensor:
    """As `denoised`, by a method that is made ready for this batch alone."""
    with ready(method, base):
        return denoised(method, base, prompts, noise, sampler, steps, guidance)
