"""Copies of a model, several times faster than building it or copy.deepcopy: most tests want one of their own."""

from __future__ import annotations

import io
import pickle
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
ALIGNED = 16  # float32 values: 64 bytes, as torch aligns what it allocates


class Copies(Generic[T]):
    """Each call returns a copy of the value as it was, which shares no tensor with it or with another copy."""

    def __init__(self, value: T) -> None:
        stream = io.BytesIO()
        writer = _Writer(stream)
        writer.dump(value)
        self._structure = stream.getvalue()
        self._tensors = [_detached(tensor) for tensor in writer.tensors]
        sizes = [-(-tensor.numel() // ALIGNED) * ALIGNED if _is_plain(tensor) else 0 for tensor in self._tensors]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._memory = torch.zeros(sum(sizes))  # all plain tensors, one after another: one copy instead of hundreds
        for tensor, start in zip(self._tensors, self._starts, strict=True):
            if _is_plain(tensor):
                self._memory[start : start + tensor.numel()] = tensor.detach().flatten()

    def __call__(self) -> T:
        return _Reader(io.BytesIO(self._structure), self._copied()).load()

    def _copied(self) -> list[Tensor]:
        memory = self._memory.clone().numpy()  # slices of an array become tensors of their own, not views of one tensor
        copies = []
        for tensor, start in zip(self._tensors, self._starts, strict=True):
            if _is_plain(tensor):
                values = torch.from_numpy(memory[start : start + tensor.numel()]).view(tensor.shape)
                copies.append(nn.Parameter(values, tensor.requires_grad) if type(tensor) is nn.Parameter else values)
            else:
                copies.append(_detached(tensor))
        return copies


def _detached(tensor: Tensor) -> Tensor:
    """The same kind of tensor, in memory of its own."""
    values = tensor.detach().clone()
    return nn.Parameter(values, tensor.requires_grad) if type(tensor) is nn.Parameter else values


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"


class _Writer(pickle.Pickler):
    """Sets tensors aside."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
