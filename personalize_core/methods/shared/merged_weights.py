"""Changes to single layers of the U-Net, merged into the layers' weights, so that sampling does no work beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.shared.tuned_weights import placed

Change = Callable[[Tensor], Tensor]
"""W (outputs, inputs) of a linear layer or a 1x1 convolution, float32 -> the weight that takes its place."""


@contextmanager
def merged(base: BaseModel, changes: Mapping[str, Change]) -> Iterator[None]:
    """Within it the U-Net computes with what the changes make of some of its weights; these are not written to.

    What is merged in bfloat16 is the weight as the checkpoint has it, which is then rounded once. A change to a rounded
    weight is mostly smaller than its last digit, and would be lost.

    Args:
        changes: path of a layer in the U-Net -> its change.
    """

    def merge(name: str, change: Change, original: Tensor) -> Tensor:
        weight = base.unrounded.get(name, original).detach().to(original.device)
        return change(weight.flatten(1)).view_as(weight).to(original.dtype)

    with placed(((f"{path}.weight", change) for path, change in changes.items()), base.unet, merge):
        yield
