"""bfloat16 and gradient checkpointing change no method's meaning.

No test here knows a method's name.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import disturbed, equal_bits, sample_latents, snapshot
from tests.every_method.cases import of_learning


@of_learning
def test_with_a_base_model_in_bfloat16_what_is_trained_stays_in_float32(case, concept, images):
    base = case.base(dtype=torch.bfloat16)
    method, before = case.make(base, concept, steps=1), snapshot(base)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    rows = train(method, base, images, seed=0)
    assert {tensor.dtype for tensor in method.state_dict().values()} == {torch.float32}
    assert not equal_bits(method.state_dict(), start)
    assert all(torch.tensor(row["diffusion"]).isfinite() for row in rows)
    assert sample_latents(method, base, [method.say("a photo of {}")], steps=1).isfinite().all()
    assert equal_bits(snapshot(base), before)


def losses_and_gradients(method: Method, base: BaseModel, images) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
    """Of the first step of each stage: every loss, and the gradient of their sum for what the stage trains."""
    found = []
    with method.attach(base):
        for stage in method.stages():
            trained = [parameter for group in stage.param_groups for parameter in group["params"]]
            torch.manual_seed(7)  # for dropout
            step = denoising_step(method, base, images, stage, seed=0, index=0)
            losses = {"diffusion": diffusion_loss(step), **stage.penalties(step)}
            total = torch.stack(list(losses.values())).sum()
            gradients = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
            found.append(({name: loss.detach() for name, loss in losses.items()}, list(gradients)))
    return found


@of_learning
def test_in_bfloat16_losses_and_gradients_are_near_those_in_float32(case, concept, images):
    full, half = (case.base(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    one, other = (case.make(base, concept).train() for base in (full, half))
    pairs = zip(losses_and_gradients(one, full, images), losses_and_gradients(other, half, images), strict=True)
    for (losses, gradients), (rounded, of_rounded) in pairs:
        total = sum(loss.item() for loss in losses.values())
        assert rounded.keys() == losses.keys()
        assert all(abs(rounded[name].item() - loss.item()) < 2e-3 * total for name, loss in losses.items())
        exact, near = (torch.cat([g.flatten().double() for g in each]) for each in (gradients, of_rounded))
        assert torch.cosine_similarity(exact, near, dim=0) > 0.99  # 0.997 and more, measured
        assert near.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)
        assert {gradient.dtype for gradient in of_rounded} == {torch.float32}


@of_learning
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(case, base, concept, images):
    method = disturbed(case.make(base, concept)).train()
    expected = losses_and_gradients(method, base, images)
    with base.recomputing():
        assert base.unet.is_gradient_checkpointing
        found = losses_and_gradients(method, base, images)
    assert not base.unet.is_gradient_checkpointing
    for (losses, gradients), (again, gradients_again) in zip(expected, found, strict=True):
        assert losses == again  # bit for bit: the forward pass is the same
        for one, other in zip(gradients, gradients_again, strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)
