"""Evaluating a method that was just trained exactly as one that was restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(method: nn.Module) -> Iterator[None]:
    """Within the block the method is in eval mode, and none of its parameters requires a gradient.

    torch's linear layer takes another path for some inputs whose weight requires a gradient, under `no_grad` too, on
    some processors for more inputs than on others. It then adds up in another order, so a method that was just trained
    and its restored artifact would differ in the last bits (docs/reproducibility.md). The method stays in eval mode;
    which parameters are trained is restored afterwards.
    """
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    method.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
