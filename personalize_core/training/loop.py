"""The training loop of every method."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method, Stage, Step
from personalize_core.randomness import generator_for, seed_for
from personalize_core.training.checkpoints import Checkpoints, LogRow, Resumed

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
) -> list[LogRow]:
    """Train `method` in place, stage after stage; the base model comes out as it went in.

    Every random number depends on (seed, stage, step) alone, so a run resumed from `checkpoints` learns, bit for bit,
    what an undisturbed run learns.

    Returns:
        The log, a row per step, from the first step on also where the run was resumed.

    Raises:
        FloatingPointError: a loss is not finite; the message says which, in which stage and step.
    """
    resumed = checkpoints.load() if checkpoints else Resumed()
    history = list(resumed.history)
    method.to(base.device).train()
    with torch.random.fork_rng(), method.attach(base):
        for number, stage in enumerate(method.stages()):
            trained = [p for group in stage.param_groups for p in group["params"]]
            method.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(stage.param_groups)
            start = 0 if number >= resumed.stage else stage.steps
            if number == resumed.stage and resumed.tensors:
                _restore(resumed.tensors, method, optimizer)
                start = resumed.step
            last_saved = time.monotonic()
            for index in range(start, stage.steps):
                row = _train_step(stage, index, trained, optimizer, method, base, images, seed)
                history.append(row)
                log(row)
                if checkpoints and time.monotonic() - last_saved > checkpoints.every_seconds:
                    checkpoints.save((number, index + 1), method, optimizer, history)
                    last_saved = time.monotonic()
    method.requires_grad_(False).eval()
    method.zero_grad()  # gradients are as large as what was trained, and what follows needs the memory
    return history


def _train_step(
    stage: Stage,
    index: int,
    trained: list[Tensor],
    optimizer: torch.optim.Optimizer,
    method: Method,
    base: BaseModel,
    images: ConceptLatents,
    seed: int,
) -> LogRow:
    torch.manual_seed(seed_for(seed, stage.name, index, "modules"))  # for dropout, which takes no generator
    step = denoising_step(method, base, images, stage, seed, index)
    losses = {"diffusion": diffusion_loss(step), **stage.penalty(step)}
    total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        raise FloatingPointError(f"stage {stage.name!r}, step {index}: the loss is {_describe(losses)}")

    optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, stage.max_gradient_norm)
    optimizer.step()
    stage.after_step(index)
    metrics = {name: loss.item() for name, loss in losses.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    row = {"stage": stage.name, "step": index, **metrics, "gradient_norm": norm.item(), "lr": rates}
    learned = method.metrics()
    return row | {"learned": learned} if learned else row


def denoising_step(
    method: Method, base: BaseModel, images: ConceptLatents, stage: Stage, seed: int, index: int
) -> Step:
    """Noise some latents to random timesteps and predict with the U-Net."""
    batch = method.batch(images, stage.batch_size, generator_for(seed, stage.name, index, "batch"))
    generator = generator_for(seed, stage.name, index, "noise")
    noise = torch.randn(batch.latents.shape, generator=generator)
    last = base.scheduler.config.num_train_timesteps
    t = torch.randint(stage.min_timestep, last, (len(noise),), generator=generator)
    x_t = base.scheduler.add_noise(batch.latents, noise, t)
    target = base.target(batch.latents, noise, t)
    x_t, t, target = x_t.to(base.device), t.to(base.device), target.to(base.device)
    context = method.condition(base, batch.prompts)(t)
    maps = AttentionMaps()
    return Step(
        base=base,
        batch=batch,
        x_t=x_t,
        t=t,
        target=target,
        prediction=base.denoise(x_t, t, context, maps),
        context=context,
        maps=maps,
        generator=generator,
    )


def diffusion_loss(step: Step) -> Tensor:
    """Squared error (eq. 1 of Rombach et al. 2022): mean over each row, then summed by the rows' weights."""
    error = (step.prediction - step.target).pow(2)
    return (step.batch.weight.to(error.device) * error).mean(dim=(1, 2, 3)).sum()


def _restore(tensors: dict[str, Tensor], method: Method, optimizer: torch.optim.Optimizer) -> None:
    method.load_state_dict(
        {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _describe(losses: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} = {loss.item():.3g}" for name, loss in losses.items())
