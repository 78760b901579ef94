"""A training step of ours and of the script that a user would run, from the same batch items."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from benchmarks.suite.floor import flops_of
from benchmarks.suite.one_step import add_gradients_of_step
from benchmarks.suite.rows import SEED, Rows, random_latents, rows_of
from benchmarks.suite.scripts.custom_diffusion import CustomDiffusionScript
from benchmarks.suite.scripts.dreambooth import DreamBoothScript
from benchmarks.suite.scripts.peft_adapters import LoRAScript, OFTScript
from benchmarks.suite.scripts.textual_inversion import TextualInversionScript
from benchmarks.suite.scripts.training_script import TrainingScript
from benchmarks.suite.setting import Setting
from benchmarks.suite.timing import Measured, now, take_turns
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method
from personalize_core.training.loop import train


@dataclass(frozen=True)
class Pair:
    """A method and the script of it."""

    script: Any  # TrainingScript's subclass
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # of our recipe, so that both do the same


PAIRS = {
    "textual_inversion": Pair(TextualInversionScript, "diffusers' textual_inversion"),
    "dreambooth": Pair(DreamBoothScript, "diffusers' train_dreambooth"),
    "lora_dreambooth": Pair(LoRAScript, "diffusers' train_dreambooth_lora, PEFT's LoRA"),
    "oft": Pair(OFTScript, "train_dreambooth_lora with PEFT's OFT"),
    # the script divides its loss by the sum of a mask of one channel
    "custom_diffusion": Pair(CustomDiffusionScript, "diffusers' train_custom_diffusion", {"instance_scale": 4}),
}


@dataclass(frozen=True)
class Both:
    """Our method and the script, of equal weights, and the batch items that both train on."""

    method: Method
    script: TrainingScript
    images: ConceptLatents
    rows: list[Rows]


def both(setting: Setting, name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Both:
    pair = PAIRS[name]
    changed: Any = setting.recipe(name)
    config = dataclasses.replace(changed, **{"steps": setting.steps, **pair.changes, **changes})
    models, method = setting.models, setting.method(name, config)
    images = random_latents(models.base)
    rows = rows_of(method, models.base, images, setting.steps)
    script = pair.script(models.parts.copied(), method, models.base, models.device, models.precision)
    return Both(method, script, images, rows)


def our_gradients(method: Method, base: BaseModel, images: ConceptLatents) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step, by the names of the method's parameters."""
    loss = add_gradients_of_step(method, base, images, method.stages()[0])
    gradients = {name: weight.grad for name, weight in method.named_parameters() if weight.grad is not None}
    method.zero_grad()
    return loss, gradients


def their_gradients(script: TrainingScript, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    """The same of the script."""
    loss = script.loss(rows)
    script.accelerator.backward(loss)
    script.after_backward()
    gradients = script.gradients()
    found = {name: gradient.clone() for name, gradient in gradients.items()}
    script.optimizer.zero_grad()
    return loss.item(), found


def difference(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> float:
    """The largest difference of losses, and of gradients relative to the largest entry of all.

    Raises:
        ValueError: not the same is trained.
    """
    (our_loss, own), (their_loss, other) = ours, theirs
    if own.keys() != other.keys():
        raise ValueError(f"only one of both trains {sorted(own.keys() ^ other.keys())[:3]}")
    largest = max(gradient.abs().max().item() for gradient in own.values())
    apart = max((own[name] - other[name].to(own[name])).abs().max().item() for name in own)
    return max(abs(our_loss - their_loss) / abs(our_loss), apart / largest)


def seconds_of_a_step(training: Callable[[Callable[[Any], None]], Any], setting: Setting) -> float:
    """From the end of the first step, which sets up the optimizer, to that of the last.

    Args:
        training: of `setting.steps` steps; it is given what to call after each.
    """
    moments, counted = [], itertools.count(1)

    def heard(step: Any) -> None:
        if next(counted) in (1, setting.steps):
            moments.append(now(setting.models.device))

    training(heard)
    return (moments[1] - moments[0]) / (setting.steps - 1)


def compare_training(setting: Setting, name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Measured:
    """Trainings of a few steps, with all that a step costs: batch items, optimizer and log."""
    pair, sides, base = PAIRS[name], both(setting, name, changes), setting.models.base
    method, script, images, rows = sides.method, sides.script, sides.images, sides.rows
    apart = difference(our_gradients(method, base, images), their_gradients(script, rows[0]))
    flops = min(
        flops_of(lambda: our_gradients(method, base, images)), flops_of(lambda: their_gradients(script, rows[0]))
    )
    ways = {
        "ours": lambda: seconds_of_a_step(lambda heard: train(method, base, images, SEED, heard), setting),
        "theirs": lambda: seconds_of_a_step(lambda heard: script.train(rows, heard), setting),
    }
    each = take_turns(ways, setting.rounds, setting.deadline, uncounted=setting.uncounted)
    about = f"{len(rows[0].latents)} batch items"
    return setting.measured("training", name, pair.name, "step", each, flops=flops, apart=apart, about=about)
