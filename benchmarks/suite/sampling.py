"""Images of ours and of the stock pipeline, from the same noise to PNG files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.floor import flops_of
from benchmarks.suite.rows import SEED
from benchmarks.suite.setting import Setting
from benchmarks.suite.timing import Measured, seconds_of, take_turns, timed
from personalize_core.methods.interface import Method
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.steps.events import unheard
from personalize_core.steps.sampling import sample_images
from personalize_core.workspace.sampling_settings import SamplerSettings

GUIDANCE = 7.5
TEMPLATES = ("a photo of a {}", "a {} on the beach", "a {} in the snow", "a {} at night")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SAMPLED = ("base_model", "lora_dreambooth", "textual_inversion")


class StockPipeline:
    """Diffusers' pipeline with what a method has learned, loaded as its documentation says."""

    def __init__(self, setting: Setting, name: str, method: Method) -> None:
        self.pipe = setting.models.parts.copied().pipeline(setting.models.device, setting.models.precision)
        self.device, self.steps = setting.models.device, setting.sampling_steps
        with tempfile.TemporaryDirectory() as folder:
            if name == "lora_dreambooth":
                method.export(setting.models.base, Path(folder))
                self.pipe.load_lora_weights(folder)
                self.pipe.fuse_lora()  # the fastest that it offers
                self.pipe.unload_lora_weights()
            elif name == "textual_inversion":
                method.export(setting.models.base, Path(folder))
                self.pipe.load_textual_inversion(str(Path(folder, "learned_embeds.safetensors")))

    def images(self, prompts: Sequence[str], noise: Tensor, batch: int, steps: int, kind: str = "pil") -> list[Any]:
        """One per prompt, `batch` at once; as PIL images, or latents."""
        found: list[Any] = []
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            found += self.pipe(
                list(prompts[rows]),
                latents=noise[rows].to(self.pipe.device, self.pipe.dtype),
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type=kind,
            ).images
        return found

    def save(self, prompts: Sequence[str], noise: Tensor, batch: int, paths: Sequence[Path]) -> None:
        for path, image in zip(paths, self.images(prompts, noise, batch, self.steps), strict=True):
            image.save(path)

    def best_batch(self, prompts: Sequence[str], noise: Tensor, paths: Sequence[Path]) -> int:
        """How many images at once take the least time for each; sizes that do not fit into memory are left out."""
        found: dict[int, float] = {}
        for batch in [each for each in BATCHES if each <= len(prompts)]:
            some = slice(batch)

            def save(batch: int = batch, some: slice = some) -> None:
                self.save(prompts[some], noise[some], batch, paths[some])

            try:
                save()  # what only a first call costs
                found[batch] = min(seconds_of(save, self.device) for _ in range(2)) / batch
            except torch.OutOfMemoryError:
                break
        return min(found, key=lambda batch: found[batch])


def learned(setting: Setting, name: str) -> Method:
    """A method that differs from its start, as if it had been trained."""
    method = setting.method(name, setting.recipe(name)).to(setting.models.base.device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter += 0.01 * noise
    return method


def places_of(images: int) -> list[tuple[int, int]]:
    """(prompt, image) of each."""
    return [(number % len(TEMPLATES), number // len(TEMPLATES)) for number in range(images)]


def stock_prompts(setting: Setting, method: Method, places: Sequence[tuple[int, int]]) -> list[str]:
    """As a user of the stock pipeline writes them: a placeholder without an embedding is the rare word."""
    said = [method.say(TEMPLATES[prompt]) for prompt, _ in places]
    if method.config.text_embeddings:
        return said
    return [prompt.replace(method.concept.placeholder, setting.models.base.tokenizer.rare_word) for prompt in said]


def latents_apart(setting: Setting, method: Method, pipeline: StockPipeline, images: int = 2) -> float:
    """How far our latents are from the pipeline's, relative to the largest."""
    base, places = setting.models.base, places_of(images)
    noise, prompts = initial_noise(base, SEED, places), [method.say(TEMPLATES[prompt]) for prompt, _ in places]
    sampler = make_sampler("ddim", base)
    ours = sample(method, base, prompts, noise, sampler, setting.sampling_steps, GUIDANCE)
    stock = pipeline.images(
        stock_prompts(setting, method, places), noise, images, setting.sampling_steps, kind="latent"
    )
    theirs = torch.stack(list(stock)).to(ours)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def compare_sampling(setting: Setting, name: str, best: int | None = None) -> tuple[Measured, int]:
    """All images to files; also returns the pipeline's batch size.

    Args:
        best: the batch size that is fastest; searched for if None.
    """
    base, places = setting.models.base, places_of(setting.images)
    method = learned(setting, name)
    pipeline, noise = StockPipeline(setting, name, method), initial_noise(base, SEED, places)
    how = SamplerSettings(sampler="ddim", steps=setting.sampling_steps, guidance=GUIDANCE)
    said = [method.say(TEMPLATES[prompt]) for prompt, _ in places]
    stock_said = stock_prompts(setting, method, places)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = ([Path(folder, f"{who}_{n}.png") for n in range(len(places))] for who in ("ours", "theirs"))

        def sampled(steps: SamplerSettings = how) -> None:
            sample_images(steps, SEED, base, method, said, places, ours, "", unheard)

        best = best or pipeline.best_batch(stock_said, noise, theirs)
        ways = {
            "ours": timed(sampled, setting.models.device),
            "theirs": timed(lambda: pipeline.save(stock_said, noise, best, theirs), setting.models.device),
        }
        apart = latents_apart(setting, method, pipeline)
        counted = [_flops(lambda steps: pipeline.images(stock_said[:1], noise[:1], 1, steps), setting.sampling_steps)]
        counted.append(_flops(lambda steps: _one(setting, method, said[0], noise[:1], steps), setting.sampling_steps))
        times = take_turns(ways, setting.rounds, setting.deadline, uncounted=setting.uncounted)
    flops, about = min(counted), f"{len(places)} images of {setting.sampling_steps} steps, stock at {best} at once"
    if setting.models.precision != "fp32":
        about += f"; it decodes in {setting.models.precision}, we in fp32"
    name_of_stock = "StableDiffusionPipeline" + (", LoRA fused" if name == "lora_dreambooth" else "")
    measured = setting.measured(
        "sampling", name, name_of_stock, "image", times, units=len(places), flops=flops, apart=apart, about=about
    )
    return measured, best


def _one(setting: Setting, method: Method, prompt: str, noise: Tensor, steps: int) -> Tensor:
    base = setting.models.base
    return base.decode(sample(method, base, [prompt], noise, make_sampler("ddim", base), steps, GUIDANCE))


def _flops(work: Callable[[int], Any], steps: int) -> int:
    """Of one image of so many steps, from runs of one and of two: every step does the same."""
    one, two = (flops_of(lambda some=some: work(some)) for some in (1, 2))
    return one + (steps - 1) * (two - one)
