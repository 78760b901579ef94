"""The training loop of every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.base_model.transfer import moved
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Batch, Method, Stage, Step
from personalize_core.randomness import generator_for, seed_for
from personalize_core.training.checkpoints import Checkpoints, LogRow, Resumed
from personalize_core.training.micro_batches import RowsAtOnce
from personalize_core.training.optimizers import OptimizerName, make_optimizer
from personalize_core.training.readings import Readings
from personalize_core.training.watcher import Unwatched, Watcher

Log = Callable[[LogRow], None]


def unlogged(row: LogRow) -> None:
    """The log of those who only want the result."""


def train(
    method: Method,
    base: BaseModel,
    images: ConceptLatents,
    seed: int,
    log: Log = unlogged,
    checkpoints: Checkpoints | None = None,
    at_once: RowsAtOnce | None = None,
    optimizer_name: OptimizerName = "adamw",
    watcher: Watcher | None = None,
) -> list[LogRow]:
    """Train `method` in place, stage after stage; the base model comes out as it went in.

    Every random number depends on (seed, stage, step) alone, so a run resumed from `checkpoints` learns, bit for bit,
    what an undisturbed run learns.

    Args:
        at_once: how many rows of a batch pass through the U-Net at once, which changes sums in their last bits alone;
            all of them if None. Where it halves itself, it stays so.
        watcher: may end a stage before its last step, and choose what is kept of the last one.

    Returns:
        The log, a row per step, from the first step on also where the run was resumed.

    Raises:
        FloatingPointError: a loss is not finite; the message says which, in which stage and step. On a graphics card
            that is noticed some steps later (`Readings`), but before a checkpoint is written.
    """
    resumed = checkpoints.load() if checkpoints else Resumed()
    history, at_once, readings = list(resumed.history), at_once or RowsAtOnce(), Readings(base.device)
    method.train().to(base.device)  # in this order: TunedWeights
    stages, watcher = method.stages(), watcher or Unwatched()
    watcher.begin(stages, resumed.watched)
    with checkpoints.writes if checkpoints else nullcontext(), torch.random.fork_rng():
        for number, stage in enumerate(stages):
            if number < resumed.stage:
                continue
            trained = [p for group in stage.param_groups for p in group["params"]]
            method.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            done = 0
            groups = stage.param_groups
            optimizer = stage.optimizer(groups) if stage.optimizer else make_optimizer(optimizer_name, groups)
            if number == resumed.stage and resumed.tensors:
                _restore(resumed.tensors, method, optimizer)
                done = resumed.step
            while True:
                optimizer.zero_grad()  # a probe needs the memory
                watcher.look(number, done)
                if done == stage.steps or watcher.has_learned(number):
                    break
                steps = _until_the_next_look(watcher, number, done)
                with (stage.attach or method.attach)(base):
                    for done in steps:
                        row = _train_step(
                            stage, done - 1, trained, optimizer, method, base, images, seed, at_once, readings
                        )
                        row |= watcher.measure(number, done)
                        history.append(row)
                        log(row)
                        if checkpoints and checkpoints.due():
                            readings.read()
                            checkpoints.save((number, done), method, optimizer, history, watcher.watched())
                readings.read()
            watcher.end(number, done)
            stage.at_end()
            optimizer.zero_grad()  # gradients are as large as what was trained, and what follows needs the memory
    method.requires_grad_(False).eval().cpu()  # it is saved next; whoever samples with it moves it
    return history


def _until_the_next_look(watcher: Watcher, number: int, done: int) -> Iterator[int]:
    """The steps of a stage behind those that are done, counted from 1; the method is attached."""
    if not done:
        watcher.measure(number, done)
    for step in range(done, watcher.pause(number, done)):
        yield step + 1
        if watcher.has_learned(number):
            return


def _train_step(
    stage: Stage,
    index: int,
    trained: list[Tensor],
    optimizer: torch.optim.Optimizer,
    method: Method,
    base: BaseModel,
    images: ConceptLatents,
    seed: int,
    at_once: RowsAtOnce,
    readings: Readings,
) -> LogRow:
    losses = None
    while losses is None:
        optimizer.zero_grad()
        torch.manual_seed(seed_for(seed, stage.name, index, "modules"))  # for dropout, which takes no generator
        rows = noisy_rows(method, base, images, stage, seed, index)
        try:
            losses = add_gradients(stage, method, base, rows, at_once.parts(len(rows.t)))
        except torch.OutOfMemoryError:
            if not at_once.halve(len(rows.t)):
                raise
        if losses is None:  # behind the handler, for what failed holds on to its tensors
            optimizer.zero_grad()
            base.give_back_memory()
    norm = clipped(trained, stage.max_gradient_norm)
    row: LogRow = {"stage": stage.name, "step": index}
    readings.add(row, losses, f"stage {stage.name!r}, step {index}")
    readings.add(row, {"gradient_norm": norm})
    optimizer.step()
    stage.after_step(index)
    row["lr"] = [group["lr"] for group in optimizer.param_groups]
    if learned := method.metrics():
        row["learned"] = {}
        readings.add(row["learned"], learned)
    readings.end_step()
    return row


def clipped(trained: Sequence[Tensor], longest: float) -> Tensor:
    """Shorten the gradient of all that is trained to length `longest`, if it is longer. Returns its length before.

    As torch.nn.utils.clip_grad_norm_, but gradients are not multiplied by 1.
    """
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if longest == math.inf or (
        norm.device.type == "cpu" and norm + 1e-6 <= longest
    ):  # elsewhere it would be waited for
        return norm
    torch.nn.utils.clip_grads_with_norm_(trained, longest, norm)
    return norm


def add_gradients(
    stage: Stage, method: Method, base: BaseModel, rows: NoisyRows, parts: Sequence[slice]
) -> dict[str, Tensor]:
    """Add the gradient of one batch to what is trained. Returns the batch's losses by name; no graph is left.

    What the cross-attention layers read is computed for the whole batch, so that what is drawn at random for it does
    not depend on the parts. Its graph is kept until all of them have passed.
    """
    context, copies = method.condition(base, rows.batch.prompts)(rows.t).cut_off()
    losses: dict[str, Tensor] = {}
    for part in parts:
        for name, loss in _add_gradients_of_part(stage, base, rows, context, part).items():
            losses[name] = losses[name] + loss if name in losses else loss
    reached = [(tensor, copy.grad) for tensor, copy in copies if copy.grad is not None]
    if reached:
        torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])
    return losses


def _add_gradients_of_part(
    stage: Stage, base: BaseModel, rows: NoisyRows, context: TextContext, part: slice
) -> dict[str, Tensor]:
    step = predicted(stage, base, rows, context, part)
    losses = {"diffusion": (stage.objective or row_losses)(step).sum(), **stage.penalty(step)}
    _total(losses).backward()
    step = replace(step, prediction=step.prediction.detach(), maps=AttentionMaps())
    losses = {name: loss.detach() for name, loss in losses.items()}
    later = stage.later_penalty(step)
    if later:
        _total(later).backward()
    return losses | {name: loss.detach() for name, loss in later.items()}


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@dataclass(frozen=True)
class NoisyRows:
    """A batch, noised to random timesteps, on the base model's device."""

    batch: Batch  # whose latents stay where they were
    x_t: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    target: Tensor  # (B, 4, h, w): noise, or velocity
    generator: Generator  # as it is behind all that was drawn so far


def denoising_step(
    method: Method, base: BaseModel, images: ConceptLatents, stage: Stage, seed: int, index: int
) -> Step:
    """Noise some latents to random timesteps and predict with the U-Net."""
    rows = noisy_rows(method, base, images, stage, seed, index)
    context = method.condition(base, rows.batch.prompts)(rows.t)
    return predicted(stage, base, rows, context, slice(0, len(rows.t)))


def noisy_rows(
    method: Method, base: BaseModel, images: ConceptLatents, stage: Stage, seed: int, index: int
) -> NoisyRows:
    """The rows of one step, which depend on (seed, stage, step) alone."""
    batch = method.batch(images, stage.batch_size, generator_for(seed, stage.name, index, "batch"))
    generator = generator_for(seed, stage.name, index, "noise")
    noise = torch.randn(batch.latents.shape, generator=generator)
    last = base.scheduler.config.num_train_timesteps
    t = torch.randint(stage.min_timestep, last, (len(noise),), generator=generator)
    return noised(base, batch, noise, t, generator)


def noised(base: BaseModel, batch: Batch, noise: Tensor, t: Tensor, generator: Generator) -> NoisyRows:
    """noise: (B, 4, h, w). t: (B,). generator: for what penalties draw."""
    x_t = base.scheduler.add_noise(batch.latents, noise, t)
    target = base.target(batch.latents, noise, t)
    told = [] if batch.sizes is None else [batch.sizes]
    x_t, target, weight, t, *sizes = moved([x_t, target, batch.weight, t, *told], base.device)
    return NoisyRows(replace(batch, weight=weight, sizes=sizes[0] if sizes else None), x_t, t, target, generator)


def predicted(stage: Stage, base: BaseModel, rows: NoisyRows, context: TextContext, part: slice) -> Step:
    """The U-Net's prediction for some of the rows.

    Args:
        context: of all rows; of which sizes they are, they say themselves.
    """
    context = context if rows.batch.sizes is None else replace(context, sizes=rows.batch.sizes)
    x_t, t, context = rows.x_t[part], rows.t[part], context.part(part)
    maps = AttentionMaps(latest_only=not stage.looks_at_attention)
    return Step(
        base=base,
        batch=rows.batch.part(part),
        x_t=x_t,
        t=t,
        target=rows.target[part],
        prediction=base.denoise(x_t, t, context, maps, part),
        context=context,
        maps=maps,
        generator=rows.generator.clone_state(),
        share=len(t) / len(rows.t),
    )


def diffusion_loss(step: Step) -> Tensor:
    """Squared error (eq. 1 of Rombach et al. 2022): mean over each row, then summed by the rows' weights."""
    return row_losses(step).sum()


def row_losses(step: Step) -> Tensor:
    """(B,): what each row contributes to the diffusion loss."""
    error = (step.prediction - step.target).pow(2)
    return (step.batch.weight * error).mean(dim=(1, 2, 3))


def _restore(tensors: dict[str, Tensor], method: Method, optimizer: torch.optim.Optimizer) -> None:
    method.load_state_dict(
        {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
    )
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            counted = value.dtype == torch.int64 and not value.ndim  # steps, where an optimizer counts them in Python
            state.setdefault(int(index), {})[key] = (
                value.item() if counted else _laid_out_as(weights[int(index)], value)
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    """With the strides of the weight, if it has its shape: torch's fused AdamW on a CPU takes them for granted."""
    return torch.empty_like(weight, dtype=value.dtype).copy_(value) if value.shape == weight.shape else value
