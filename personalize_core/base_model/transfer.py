"""Tensors from the host's memory to a device, in few copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device.

    To a graphics card they go in one copy for each type, from pinned memory, so that the host does not wait for the
    card to have done what it was told before.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    found = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors if tensor.device.type == "cpu"}:
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype and tensor.device.type == "cpu"]
        packed = torch.cat([tensors[i].flatten() for i in places]).pin_memory().to(device, non_blocking=True)
        parts = packed.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(tensors[i].shape)
    return found
