"""The optimizer of a stage."""

from __future__ import annotations

from typing import Any

import torch


def make_optimizer(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, with torch's betas, epsilon and weight decay where a group does not say otherwise.

    On a graphics card it runs in one kernel, which needs no copy of the second moments and rounds otherwise than on a
    CPU.
    """
    return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None)
