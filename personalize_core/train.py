"""The training loop of every method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from personalize_core.attention import AttentionMaps
from personalize_core.base import BaseModel
from personalize_core.data import ConceptLatents
from personalize_core.files import save_tensors
from personalize_core.method import Method, Stage, Step
from personalize_core.randomness import generator_for, seed_for

Log = Callable[[str, int, dict[str, float]], None]
"""(stage name, step index, loss and other numbers by name) -> None"""


@dataclass(frozen=True)
class Checkpoints:
    """Where a run that may be cut off keeps its state, so that it resumes to the same result."""

    folder: Path
    stamp: str  # what the run depends on; a checkpoint of anything else is not read
    every_seconds: float = 60.0

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self, position: tuple[int, int], method: Method, optimizer: torch.optim.Optimizer) -> None:
        """position: (stage, next step)."""
        state = optimizer.state_dict()["state"]
        tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, values in state.items()
            for name, value in values.items()
        }
        save_tensors(self.path, tensors, {"stamp": self.stamp, "position": json.dumps(position)})

    def load(self) -> tuple[tuple[int, int], dict[str, Tensor]] | None:
        """(stage, next step) and the tensors, or None where there is nothing to resume."""
        if not self.path.exists():
            return None
        with safe_open(self.path, framework="pt") as saved:
            metadata = saved.metadata() or {}
            if metadata.get("stamp") != self.stamp:
                return None
            stage, step = json.loads(metadata["position"])
            return (stage, step), {name: saved.get_tensor(name) for name in saved.keys()}

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def train(
    method: Method,
    base: BaseModel,
    images: ConceptLatents,
    seed: int,
    log: Log,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `method` in place, stage after stage; the base model comes out as it went in.

    Every draw depends on (seed, stage, step) alone, so a run resumed from `checkpoints` learns, bit for bit,
    what an undisturbed run learns.

    Raises:
        FloatingPointError: a loss is not finite; the message says which, in which stage and step.
    """
    saved = checkpoints.load() if checkpoints else None
    (first_stage, first_step), tensors = saved or ((0, 0), {})
    method.to(base.device).train()
    with torch.random.fork_rng(), method.attach(base):
        for number, stage in enumerate(method.stages()):
            if number < first_stage:
                continue
            resume = tensors if number == first_stage else {}
            start = first_step if number == first_stage else 0
            _run_stage(number, stage, start, resume, method, base, images, seed, log, checkpoints)
    method.requires_grad_(False).eval()


def _run_stage(
    number: int,
    stage: Stage,
    start: int,
    resume: dict[str, Tensor],
    method: Method,
    base: BaseModel,
    images: ConceptLatents,
    seed: int,
    log: Log,
    checkpoints: Checkpoints | None,
) -> None:
    trained = [p for group in stage.param_groups for p in group["params"]]
    method.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(stage.param_groups)
    if resume:
        _restore(resume, method, optimizer)
    last_saved = time.monotonic()

    for index in range(start, stage.steps):
        torch.manual_seed(seed_for(seed, stage.name, index, "modules"))  # for dropout, which takes no generator
        step = denoising_step(method, base, images, stage, seed, index)
        losses = {"diffusion": diffusion_loss(step), **stage.penalty(step)}
        total = torch.stack(list(losses.values())).sum()
        if not total.isfinite():
            raise FloatingPointError(f"stage {stage.name!r}, step {index}: the loss is {_describe(losses)}")

        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        optimizer.step()
        stage.after_step(index)
        log(stage.name, index, {name: loss.item() for name, loss in losses.items()} | {"gradient_norm": norm.item()})
        if checkpoints and time.monotonic() - last_saved > checkpoints.every_seconds:
            checkpoints.save((number, index + 1), method, optimizer)
            last_saved = time.monotonic()


def denoising_step(
    method: Method, base: BaseModel, images: ConceptLatents, stage: Stage, seed: int, index: int
) -> Step:
    """Noise some latents to random timesteps and let the U-Net answer."""
    batch = method.batch(images, stage.batch_size, generator_for(seed, stage.name, index, "batch"))
    generator = generator_for(seed, stage.name, index, "noise")
    noise = torch.randn(batch.latents.shape, generator=generator)
    t = torch.randint(base.scheduler.config.num_train_timesteps, (len(noise),), generator=generator)
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
