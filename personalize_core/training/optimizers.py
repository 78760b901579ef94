"""The optimizer of a stage, by its name in params.yaml; importing this module imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from personalize_core.errors import InputError

if TYPE_CHECKING:
    import torch

OptimizerName = Literal["adamw", "adamw8bit"]


def check_optimizer(name: OptimizerName) -> None:
    """Raise InputError if a package that it needs is not installed."""
    if name == "adamw8bit" and not find_spec("bitsandbytes"):
        raise InputError(
            "optimizer: adamw8bit needs the package bitsandbytes, which is not installed; install it with "
            "`.venv/bin/python -m pip install --constraint constraints.txt bitsandbytes`, or write `optimizer: "
            "adamw` in params.yaml"
        )


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, with torch's betas, epsilon and weight decay where a group does not say otherwise.

    On a graphics card "adamw" runs in one kernel, which needs no copy of the second moments and rounds otherwise than
    on a CPU. "adamw8bit" keeps both moments in 8 bits, in blocks with a scale each (Dettmers et al. 2022,
    arXiv:2110.02861); those of tensors with fewer than 4096 numbers stay in float32.
    """
    import torch

    check_optimizer(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(groups)
    return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None)
