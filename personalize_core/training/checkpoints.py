"""The state of an unfinished training on disk, so that it resumes to the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from personalize_core.methods.interface import Method

LogRow = dict[str, Any]
"""One step: "stage", "step", each loss under its name, "gradient_norm" before clipping, "lr" of each group of its
stage, and "learned", where a method has any: the numbers that it says of itself after the step."""


@dataclass(frozen=True)
class Resumed:
    """The state that a run goes on from."""

    stage: int = 0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[LogRow] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoints:
    """Where a run that may be cut off keeps its state, so that it resumes to the same result."""

    folder: Path
    stamp: str  # what the run depends on; a checkpoint of anything else is not read
    every_seconds: float = 60.0

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(
        self, position: tuple[int, int], method: Method, optimizer: torch.optim.Optimizer, history: list[LogRow]
    ) -> None:
        """position: (stage, next step). history: the log so far."""
        import torch

        state = optimizer.state_dict()["state"]
        tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, values in state.items()
            for name, value in _flat(values)
        }
        tensors = _apart(tensors)
        progress = json.dumps({"stamp": self.stamp, "position": position, "history": history})
        save_tensors(self.path, tensors, {"progress": progress})

    def load(self) -> Resumed:
        """Where to go on; the very beginning, if there is nothing to resume."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as saved:
                progress = json.loads(saved.metadata()["progress"])
                if progress["stamp"] == self.stamp:
                    stage, step = progress["position"]
                    tensors = {name: saved.get_tensor(name) for name in saved.keys()}
                    return Resumed(stage, step, tensors, progress["history"])
        except (FileNotFoundError, SafetensorError):  # the second: a power cut may leave an empty file
            pass
        return Resumed()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's state of one tensor; bitsandbytes puts most of it into a dictionary inside."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors wants them: bitsandbytes' states share a table."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() > 0 and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        found[name] = tensor.clone() if shared else tensor
    return found
