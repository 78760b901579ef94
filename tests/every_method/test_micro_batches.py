"""A batch that is computed in parts has the losses and the gradient of the whole batch.

No test here knows a method's name.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.training.loop import add_gradients, noisy_rows
from personalize_core.training.micro_batches import RowsAtOnce
from tests.conftest import disturbed
from tests.every_method.cases import of_learning


def losses_and_gradient(method: Method, base: BaseModel, images, at_once: RowsAtOnce) -> list[tuple[dict, Tensor]]:
    """Of the first step of each stage: every loss, and the gradient of all that the stage trains."""
    found = []
    for stage in method.stages():
        trained = [parameter for group in stage.param_groups for parameter in group["params"]]
        method.requires_grad_(False).zero_grad()
        for parameter in trained:
            parameter.requires_grad_(True)
        torch.manual_seed(7)  # for dropout
        with (stage.attach or method.attach)(base):
            rows = noisy_rows(method, base, images, stage, seed=0, index=0)
            losses = add_gradients(stage, method, base, rows, at_once.parts(len(rows.t)))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        found.append(
            (
                {name: loss.item() for name, loss in losses.items()},
                torch.cat([gradient.flatten().double() for gradient in gradients]),
            )
        )
    return found


@of_learning
def test_one_row_at_a_time_gives_the_losses_and_the_gradient_of_the_whole_batch(case, base, concept, images):
    # Not far: the attention of a U-Net that is changed much looks at single places, and multiplies rounding.
    method = disturbed(case.make(base, concept), by=0.03).train()
    whole = losses_and_gradient(method, base, images, RowsAtOnce())
    parts = losses_and_gradient(method, base, images, RowsAtOnce(1))
    for stage, (losses, gradient), (of_parts, sum_of_parts) in zip(method.stages(), whole, parts, strict=True):
        # An objective of its own may be steep: it then multiplies what batches of other sizes round otherwise.
        tolerance = 1e-3 if stage.objective else 1e-5
        assert of_parts == pytest.approx(losses, rel=tolerance)
        assert gradient.norm() > 0
        assert (sum_of_parts - gradient).norm() <= tolerance * gradient.norm()
