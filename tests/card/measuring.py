"""Train, prove and sample at true shapes on the pretended card, and read what that took."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from personalize_core.artifacts import proof
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ZOOMS, ConceptLatents
from personalize_core.methods import method_class
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.options import LAG
from personalize_core.sampling.sampler import at_once, make_sampler, sample
from personalize_core.sampling.some_images import images_by
from personalize_core.training.fixed_batch import fixed_batch_losses
from personalize_core.training.loop import train
from personalize_core.training.watcher import Unwatched
from personalize_core.workspace.probe_settings import ProbeSettings
from personalize_core.workspace.sampling_settings import SamplerSettings
from tests.card.cells import Base, Cell
from tests.card.costs import CellCost, StepCost
from tests.card.watch import WATCH, Peak
from tests.true_shapes import true_parts

STEPS = 2  # of every stage: from the second on the optimizer holds its moments
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measured(cell: Cell) -> CellCost:
    """What a cell takes; on a pretended card without values (`pretended_card(meta=True)`).

    Gradient checkpointing does not change the proof, which is then left out. Sampling is measured in bfloat16 alone,
    once for all batches.
    """
    base, loading, base_model = base_model_of(cell.base, cell.precision)
    with _collected_between_steps():
        before = WATCH.live
        method = untrained(cell.method, base, cell.one_image)
        learned = WATCH.live - before
        images = images_for(base)
        stages, probe = _training(method, base, images, cell)
        held = WATCH.live - before + base_model
        proof = None if cell.checkpointing else _proof(method, base, images) - before + base_model
        strategies = _strategies(method) if cell.setting == "bf16" else {}
        sampling = {name: _sampling(method, base, chosen) for name, chosen in strategies.items()}
        del method
        base.give_back_memory()
        gc.collect()
        left = WATCH.live - before
    others = before - base_model  # base models of other cells

    def alone(step: StepCost) -> StepCost:
        in_optimizer = step.in_optimizer and step.in_optimizer - others
        return dataclasses.replace(step, peak=step.peak - others, in_optimizer=in_optimizer)

    return CellCost(
        base_model=base_model,
        loading=loading,
        learned=learned,
        stages={name: alone(step) for name, step in stages.items()},
        probe=alone(probe),
        held=held,
        proof=proof,
        sampling={name: alone(step) for name, step in sampling.items()},
        left=left,
    )


@cache
def base_model_of(name: Base, precision: str) -> tuple[BaseModel, int, int]:
    """The base model, the most while it was put on the card, and what it holds there: bytes. No method changes it."""
    WATCH.restart()
    before = WATCH.live
    base = BaseModel(
        name=name,
        revision="none",
        weights_hash="none",
        **true_parts(name),
        device="cuda",
        dtype=DTYPES[precision],
    )
    return base, WATCH.peak.size - before, WATCH.live - before


def untrained(name: str, base: BaseModel, one_image: bool = False) -> Method:
    """one_image: of the concept in each step, however many the recipe has."""
    kind: Any = method_class(name)
    fields = {field.name: field.default for field in dataclasses.fields(kind.Config)}
    short: dict[str, Any] = {name: STEPS for name, default in fields.items() if name.endswith("steps") and default}
    if one_image:
        short |= {name: 1 for name in fields if name.endswith("batch_size")}
    with torch.device("meta"):  # else some methods would decompose large random matrices
        method = kind(kind.Config(**short), base, Concept("v", "<v>", "dog"))
    return method.to(base.device)


def images_for(base: BaseModel) -> ConceptLatents:
    """Four concept images with as many views as any method asks for, and four class images."""
    channels, height, width = base.latent_shape

    def moments(views: int) -> Tensor:
        return torch.zeros(views, 2, channels, height, width)

    return ConceptLatents([moments(ZOOMS) for _ in range(4)], class_images=[moments(1) for _ in range(4)])


def _training(
    method: Method, base: BaseModel, images: ConceptLatents, cell: Cell
) -> tuple[dict[str, StepCost], StepCost]:
    """A step of each stage, and a probe."""
    names, prober = iter([stage.name for stage in method.stages() if stage.steps]), _Prober(method, base)
    with _StepReader() as reader, base.recomputing() if cell.checkpointing else nullcontext():
        train(method, base, images, seed=0, watcher=prober)
    assert prober.cost
    return {name: step for name, step in zip(names, reader.last_steps, strict=True)}, prober.cost


class _Prober(Unwatched):
    """Takes a probe behind the last step, beside all that a training holds between two steps."""

    def __init__(self, method: Method, base: BaseModel) -> None:
        self.method, self.base = method, base
        self.cost: StepCost | None = None

    def look(self, number: int, done: int) -> None:
        if number == len(self.steps) - 1 and done == self.steps[number]:
            WATCH.restart()
            prompts = [self.method.say("a photo of a {}")] * ProbeSettings().prompts + ["a photo of a dog"]
            how = SamplerSettings(sampler="ddim", steps=STEPS, guidance=7.5)
            places = [(place, 0) for place in range(len(prompts))]
            images_by(self.method, self.base, prompts, places, how, STEPS, seed=0)
            self.cost = StepCost.read(WATCH)
            with self.method.train().attach(self.base):  # as a next step would: what was made for sampling goes
                pass


class _StepReader:
    """Reads the watch at the end of each step of any optimizer, so that a step lasts from one such end to the next."""

    def __init__(self) -> None:
        self.last_steps: list[StepCost] = []  # the last of each optimizer, in their order
        self._optimizer: weakref.ref[Any] | None = None
        self._before_optimizer = Peak()

    def __enter__(self) -> _StepReader:
        self._hooks = [
            register_optimizer_step_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        ]
        return self

    def __exit__(self, *failure: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *call: Any) -> None:
        self._before_optimizer = WATCH.peak
        WATCH.restart_peak()

    def _end(self, optimizer: torch.optim.Optimizer, *call: Any) -> None:
        if self._optimizer is None or self._optimizer() is not optimizer:
            self._optimizer = weakref.ref(optimizer)
            self.last_steps.append(StepCost.read(WATCH, self._before_optimizer))
        self.last_steps[-1] = StepCost.read(WATCH, self._before_optimizer)
        WATCH.restart()


def _proof(method: Method, base: BaseModel, images: ConceptLatents) -> int:
    """The peak of all that the trainer computes once the artifact is saved: bytes."""
    WATCH.restart()
    fixed_batch_losses(method, base, ConceptLatents(images.concept[:1]), seed=0)
    proof.sampled_latents(method, base)
    return WATCH.peak.size


def _strategies(method: Method) -> dict[str, Any]:
    kind = method.config.Sampling
    return {"plain": kind()} | ({"LAG": kind(lag=True)} if issubclass(kind, LAG) else {})


def _sampling(method: Method, base: BaseModel, chosen: Any) -> StepCost:
    """The second step of sampling as many images as are sampled at once."""
    steps: list[StepCost] = []

    def progress(done: int, total: int) -> None:
        steps.append(StepCost.read(WATCH))
        WATCH.restart()

    before, method.sampling = method.sampling, chosen
    images = at_once(base)
    prompts, noise = [method.say("a photo of a {}")] * images, torch.zeros(images, *base.latent_shape)
    sample(method, base, prompts, noise, make_sampler("ddim", base, progress), 2, 7.5)
    method.sampling = before
    return steps[-1]


@contextmanager
def _collected_between_steps() -> Iterator[None]:
    """Garbage is collected where the watch restarts alone, so that the same code takes the same memory each time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
