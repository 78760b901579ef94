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


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, with torch's betas, epsilon and weight decay where a group does not say otherwise.

    "adamw" takes torch's fused form, one kernel for all tensors: a sixth of the time of many small tensors on a CPU, a
    third of that of large ones, and no copy of the second moments on a graphics card. "adamw8bit" keeps both moments in
    8 bits, in blocks with a scale each (Dettmers et al. 2022, arXiv:2110.02861); those of tensors with fewer than 4096
    numbers stay in float32.
    """
    import torch

    check_optimizer(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        optimizer = AdamW8bit(groups)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True)
    optimizer.register_step_post_hook(_tell_that_weights_changed)
    return optimizer


def _tell_that_weights_changed(optimizer: torch.optim.Optimizer, *call: Any) -> None:
    """Fused kernels write to tensors without counting up their version, by which others see that they have changed."""
    from torch.autograd.graph import increment_version

    increment_version([weight for group in optimizer.param_groups for weight in group["params"]])
