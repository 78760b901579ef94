"""A training step of ours beside the least that it must do: the U-Net's forward and backward on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.floor import flops_of
from benchmarks.suite.models import DTYPES
from benchmarks.suite.one_step import begin
from benchmarks.suite.recipe_cost import steps_of, with_steps
from benchmarks.suite.rows import SEED, random_latents
from benchmarks.suite.setting import Models, Setting
from benchmarks.suite.timing import Measured, now, seconds_of
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method, Stage
from personalize_core.training.loop import NoisyRows, noisy_rows, train


@dataclass(frozen=True)
class Reached:
    """Where the gradient of a stage goes in the base model's U-Net."""

    weights: Collection[str]  # names of those that the method has put there and trains
    text: bool  # what the cross-attention layers read

    @classmethod
    def by(cls, stage: Stage, method: Method, base: BaseModel, prompts: Sequence[str]) -> Reached:
        begin(method, base, stage)
        with (stage.attach or method.attach)(base):
            weights = [name for name, weight in base.unet.named_parameters() if weight.requires_grad]
            context = method.condition(base, prompts)(torch.zeros(len(prompts), dtype=torch.long, device=base.device))
        layers = context.layers or ()
        return cls(frozenset(weights), any(text.requires_grad for text in (context.hidden, *layers)))


class BareUNet:
    """Diffusers' own U-Net and nothing else: its forward pass, the squared error, its backward pass.

    A gradient is wanted for the weights that the method trains, and for the text where the method trains what the text
    is computed from. Where it trains neither, but modules of its own beside the layers, the text gets one instead, so
    that the backward pass goes through all layers as the method's does. The text itself is encoded beforehand. There is
    no optimizer, no clipping, no log, no noising and no penalty: all of that is what a step costs beyond the U-Net.
    """

    def __init__(self, models: Models, reached: Reached) -> None:
        dtype, self.unet = DTYPES[models.precision], models.parts.copied().unet.requires_grad_(False).eval()
        for name, weight in self.unet.named_parameters():
            tuned = name in reached.weights
            weight.data = weight.data.to(models.device, torch.float32 if tuned else dtype)
            weight.requires_grad_(tuned)
        self.text_has_gradient = reached.text or not reached.weights
        self.autocast: Callable[[], Any] = (
            nullcontext if dtype == torch.float32 else lambda: torch.autocast(models.device, dtype)
        )

    def step(self, x_t: Tensor, t: Tensor, hidden: Tensor, target: Tensor, weight: Tensor) -> None:
        """Gradients of the loss of `training.loop.diffusion_loss`; what was there before is gone.

        Args:
            hidden: (B, L, D), what the text encoder says of the prompts.
            weight: (B, 1, 1, 1) or (B, 1, h, w).
        """
        with self.autocast():
            prediction = self.unet(x_t, t, hidden).sample
        (weight * (prediction.float() - target).pow(2)).mean(dim=(1, 2, 3)).sum().backward()

    def seconds(self, device: str, rows: NoisyRows, hidden: Tensor) -> float:
        """Of one step, without what comes before and after it."""
        text = hidden.detach().requires_grad_(self.text_has_gradient)
        taken = seconds_of(lambda: self.step(rows.x_t, rows.t, text, rows.target, rows.batch.weight), device)
        self.unet.zero_grad()
        return taken


def compare_bare(setting: Setting, name: str) -> list[Measured]:
    """A row of the table for each stage of a method; none for a method that trains nothing.

    The two take turns: after each step of one training the bare U-Net passes the same batch. The first step of a stage,
    which sets up the optimizer, is not counted.
    """
    recipe, uncounted = setting.recipe(name), 1 + setting.uncounted
    steps = dict.fromkeys(steps_of(recipe), uncounted + setting.rounds * setting.steps)
    config, images = with_steps(recipe, steps), random_latents(setting.models.base)
    start, method = setting.method(name, config), setting.method(name, config)
    turns = {stage.name: _Turns(setting, start, stage, images) for stage in start.stages()}
    train(method, setting.models.base, images, SEED, lambda row: turns[row["stage"]].heard(row["step"], uncounted))
    return [
        setting.measured(
            "bare",
            f"{name}, {stage}",
            "the U-Net alone",
            "step",
            of_stage.times,
            flops=of_stage.flops,
            about=f"{of_stage.batch_items} batch items",
        )
        for stage, of_stage in turns.items()
    ]


class _Turns:
    """The steps of one stage: how long ours took, and how long the bare U-Net takes with the same batch.

    Args:
        method: as it was before training; it tells batches and what is trained.
    """

    def __init__(self, setting: Setting, method: Method, stage: Stage, images: ConceptLatents) -> None:
        self.models, self.method, self.stage, self.images = setting.models, method, stage, images
        rows, hidden = self._batch(0)
        self.batch_items = len(rows.t)
        self.bare = BareUNet(self.models, Reached.by(stage, method, self.models.base, rows.batch.prompts))
        self.flops = flops_of(lambda: self.bare.seconds(self.models.device, rows, hidden))
        self.times: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.began = 0.0  # of our next step

    def heard(self, index: int, uncounted: int) -> None:
        """Our step `index` has just ended."""
        ours = now(self.models.device) - self.began
        theirs = self.bare.seconds(self.models.device, *self._batch(index))
        if index >= uncounted:
            self.times["ours"].append(ours)
            self.times["theirs"].append(theirs)
        self.began = now(self.models.device)

    @torch.no_grad()
    def _batch(self, index: int) -> tuple[NoisyRows, Tensor]:
        """The batch of a step, and what the text encoder says of its prompts."""
        base = self.models.base
        rows = noisy_rows(self.method, base, self.images, self.stage, SEED, index)
        return rows, base.encode(rows.batch.prompts, self.method.concept).hidden
