"""A processor on which equal numbers meet other kernels, to see here what would fail there.

`torch.matmul`, and with it a linear layer, folds its rows into one matrix product where the weight has requires_grad
set, also under no_grad, and may take a batched product where it has not; a product's kernel is chosen by its shape,
too. Whether two kernels round alike depends on the processor. `pytest --other-processor requires_grad` runs the tests
as if kernels differed wherever a weight has requires_grad set, `--other-processor rows` wherever the number of rows
differs. What fails claims equal bits of unlike things: make both sides alike, or state a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

How = Literal["requires_grad", "rows"]
ROUNDING = 16  # times the type's smallest relative step: what another kernel changes, a little exaggerated


def kernel(how: How, x: Tensor, weight: Tensor) -> int:
    """A number that stands for the kernel that multiplies these; 0 is this processor's."""
    if how == "requires_grad":
        return int(x.ndim > 2 and weight.ndim == 2 and weight.requires_grad)
    return x.shape[:-1].numel() - 1


def _rounded(product: Callable[..., Tensor], how: How) -> Callable[..., Tensor]:
    def multiply(x: Tensor, weight: Tensor, *more: Any, **named: Any) -> Tensor:
        answer, chosen = product(x, weight, *more, **named), kernel(how, x, weight)
        if not chosen or not answer.is_floating_point():
            return answer
        places = torch.arange(1, 1 + (answer.shape[-1] if answer.ndim else 1), dtype=torch.float64)
        step = ROUNDING * torch.finfo(answer.dtype).eps
        return answer * (1 + step * torch.sin(chosen * places)).to(answer).reshape(-1 if answer.ndim else ())

    return multiply


@contextmanager
def other_processor(how: How) -> Iterator[None]:
    """Within it, linear layers and matrix products round as on another processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", _rounded(torch.nn.functional.linear, how))
        patch.setattr(torch, "matmul", _rounded(torch.matmul, how))
        patch.setattr(Tensor, "__matmul__", _rounded(Tensor.__matmul__, how))
        yield
