"""The training loop that every stage of the miniature shares: resumable, seeded, with progress and time left."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WORK = Path("data/.work/mini")  # checkpoints and images on the way; never in git


class Stage(Protocol):
    """What the loop needs to know of a stage. A step's randomness comes from its number alone."""

    name: str
    seed: int
    modules: dict[str, nn.Module]  # all that a checkpoint holds, averages included

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        """The loss of one batch, and how many samples it saw."""
        ...

    def after_step(self, number: int) -> None: ...

    def look(self, folder: Path, number: int) -> str:
        """Draw an image into the folder; a line for the log."""
        ...


@dataclass
class Progress:
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    notes: dict[str, object] = field(default_factory=dict)


def rate(step: int, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """A share of the full learning rate: linear warm-up, level, linear decay over the last part of the run."""
    return min((step + 1) / warmup, 1.0, max((steps - step) / (decay * steps), 0.01))


def train(
    stage: Stage,
    steps: int,
    folder: Path = WORK,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    until: int | None = None,
    save_every: float = 120.0,
    look_every: int = 500,
    log_every: int = 50,
) -> Progress:
    """Train to the end of a schedule of `steps`, or to step `until`, or for `minutes`; from the checkpoint, if any."""
    folder = folder / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    progress = restore(stage, folder)
    progress.device = device
    base_rates = [group.setdefault("base_lr", group["lr"]) for group in stage.optimizer.param_groups]
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    began = saved = logged = time.monotonic()
    window: list[float] = []
    asked_to_stop: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: asked_to_stop.append(number))  # save before leaving
    last = steps if until is None else min(until, steps)
    while progress.step < last and not asked_to_stop and (minutes is None or time.monotonic() - began < 60 * minutes):
        number = progress.step
        for group, base in zip(stage.optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * rate(number, steps)
        rng = np.random.default_rng([stage.seed, number])
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + number)
        started = time.monotonic()
        loss, seen = stage.step(number, rng, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"stage {stage.name!r}, step {number}: the gradient's norm is {float(norm)}")
        stage.optimizer.step()
        stage.optimizer.zero_grad(set_to_none=True)
        stage.after_step(number)
        progress.step, progress.samples = number + 1, progress.samples + seen
        progress.seconds += time.monotonic() - started
        window.append(float(loss.detach()))
        if progress.step % log_every == 0:
            now = time.monotonic()
            left = (now - logged) / len(window) * (steps - progress.step)
            line = f"{time.strftime('%H:%M:%S')} {stage.name} step {progress.step}/{steps} loss {np.mean(window):.4f}"
            print(f"{line} {len(window) * seen / (now - logged):.0f} samples/s, {left / 60:.0f} min left", flush=True)
            window, logged = [], now
        if progress.step % look_every == 0:
            print(f"  {stage.look(folder, progress.step)}", flush=True)
        if time.monotonic() - saved > save_every:
            save(stage, folder, progress)
            saved = time.monotonic()
    save(stage, folder, progress)
    print(
        f"{stage.name}: {progress.step} steps, {progress.samples} samples, {progress.seconds / 60:.1f} min", flush=True
    )
    return progress


def save(stage: Stage, folder: Path, progress: Progress) -> None:
    """Write the checkpoint beside the old one, then exchange them. No pickle: tensors, and JSON for the rest."""
    tensors = {f"module/{name}/{k}": v for name, m in stage.modules.items() for k, v in m.state_dict().items()}
    for index, state in stage.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    temporary, target = folder / "checkpoint.tmp", folder / "checkpoint.safetensors"
    metadata = {"progress": json.dumps(progress.__dict__)}
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, metadata)
    os.replace(temporary, target)


def read_progress(folder: Path) -> Progress:
    from safetensors import safe_open

    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return Progress(**json.loads(file.metadata()["progress"]))


def last(work: Path, *stages: str) -> Path:
    """The folder of the first of the stages that has a checkpoint; of the last one where none has."""
    folders = [work / stage for stage in stages]
    return next((folder for folder in folders if (folder / "checkpoint.safetensors").exists()), folders[-1])


def load_modules(folder: Path, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Fill the modules from a checkpoint; give back what else it holds."""
    tensors = load_file(folder / "checkpoint.safetensors")
    for name, module in modules.items():
        prefix = f"module/{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return tensors


def restore(stage: Stage, folder: Path) -> Progress:
    if not (folder / "checkpoint.safetensors").exists():
        return Progress()
    tensors = load_modules(folder, stage.modules)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    if state:
        stage.optimizer.load_state_dict(stage.optimizer.state_dict() | {"state": state})
    return read_progress(folder)
