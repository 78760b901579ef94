"""The state of an unfinished training on disk, so that it resumes to the same result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import save_tensors
from personalize_core.files.background import Background
from personalize_core.training.watcher import Watched

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from personalize_core.methods.interface import Method

WATCHED = "watched."
LogRow = dict[str, Any]
"""One step: "stage", "step", each loss under its name, "gradient_norm" before clipping, "lr" of each group of its
stage, and "learned", where a method has any: the numbers that it says of itself after the step. On a graphics card they
are None until the host reads them (`Readings`)."""


@dataclass(frozen=True)
class Resumed:
    """The state that a run goes on from."""

    stage: int = 0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[LogRow] = field(default_factory=list)
    watched: Watched = Watched()


@dataclass
class Checkpoints:
    """Where a run that may be cut off keeps its state, so that it resumes to the same result.

    A checkpoint is written in a thread, from a copy of all tensors, while the training goes on. What fails there is
    raised by the next call, or at the end of a `with` block on `writes`.
    """

    folder: Path
    stamp: str  # what the run depends on; a checkpoint of anything else is not read
    every_seconds: float = 60.0  # at least, from one checkpoint to the next
    share: float = 0.02  # of the time, at most, in which one is being saved

    def __post_init__(self) -> None:
        self.writes = Background()
        self._began, self._took = time.monotonic(), 0.0  # the last save: when, and how many seconds until it was done

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def due(self) -> bool:
        """Is it time for the next? How long the last took decides, and for the first `every_seconds`."""
        self.writes.check()
        passed = time.monotonic() - self._began
        took = passed if self.writes.busy else self._took
        return passed >= max(self.every_seconds, took / self.share)

    def save(
        self,
        position: tuple[int, int],
        method: Method,
        optimizer: torch.optim.Optimizer,
        history: list[LogRow],
        watched: Watched,
    ) -> None:
        """Once the one before is written, copy everything; that is written then.

        Args:
            position: (stage, next step).
            history: the log so far.
            watched: not changed from now on.
        """
        import torch

        self.writes.wait()
        self._began = time.monotonic()
        state = optimizer.state_dict()["state"]
        tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, values in state.items()
            for name, value in _flat(values)
        }
        tensors |= {f"{WATCHED}{name}": tensor for name, tensor in watched.tensors.items()}
        progress = {"stamp": self.stamp, "position": position, "history": list(history), "watched": watched.values}
        self.writes.do(partial(self._write, Copies.of(tensors), progress))

    def _write(self, copies: Copies, progress: dict[str, Any]) -> None:
        copies.wait()
        save_tensors(self.path, copies.tensors, {"progress": json.dumps(progress)})
        self._took = time.monotonic() - self._began

    def load(self) -> Resumed:
        """Where to go on; the very beginning, if there is nothing to resume."""
        from safetensors import SafetensorError, safe_open

        self.writes.wait()
        self._began = time.monotonic()
        try:
            with safe_open(self.path, framework="pt") as saved:
                progress = json.loads(saved.metadata()["progress"])
                if progress["stamp"] == self.stamp:
                    stage, step = progress["position"]
                    tensors = {name: saved.get_tensor(name) for name in saved.keys()}
                    seen = {name: tensors.pop(name) for name in list(tensors) if name.startswith(WATCHED)}
                    seen = {name.removeprefix(WATCHED): tensor for name, tensor in seen.items()}
                    watched = Watched(progress["watched"], seen)
                    return Resumed(stage, step, tensors, progress["history"], watched)
        except (FileNotFoundError, SafetensorError):  # the second: a power cut may leave an empty file
            pass
        return Resumed()

    def clear(self) -> None:
        self.writes.wait()
        self.path.unlink(missing_ok=True)


@dataclass
class Copies:
    """Tensors as they are now, in the CPU's memory, each in memory of its own."""

    tensors: dict[str, Tensor]
    wait: Callable[[], object]  # until they are there

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Copies:
        """From a graphics card into pinned memory: whoever asks for them need not wait, nor does the card."""
        import torch

        copied = {
            name: tensor.detach().to("cpu", non_blocking=True) if tensor.is_cuda else tensor.detach().clone()
            for name, tensor in tensors.items()
        }
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return cls(copied, lambda: None)
        copying = torch.cuda.Event()
        copying.record()
        return cls(copied, copying.synchronize)


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's state of one tensor; bitsandbytes puts most of it into a dictionary inside."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value
