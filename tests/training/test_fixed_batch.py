"""Whether training taught the model these concept images, on rows that stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from personalize_core.methods import method_class
from personalize_core.methods.interface import Method, Stage
from personalize_core.methods.recipe import Recipe
from personalize_core.training.fixed_batch import TIMESTEPS, fixed_batch_losses, improvement, timesteps_of
from personalize_core.training.loop import train
from tests.conftest import snapshot, tiny_base


@pytest.fixture
def base():
    return tiny_base()


class Nothing(Method):
    """Learns nothing."""

    def stages(self):
        return []


class Offset(Method):
    """Learns what to add to the U-Net's answer: surely enough to bring the loss down."""

    def __init__(self, base, concept) -> None:
        super().__init__(Recipe(), base, concept)
        self.bias = nn.Parameter(torch.zeros(4, 8, 8))

    def stages(self):
        return [Stage("bias", 40, 4, [{"params": [self.bias], "lr": 0.05}])]

    def attach(self, base):
        from personalize_core.base_model.hooks import hooked

        return hooked(base.unet.conv_out.register_forward_hook(lambda module, args, output: output + self.bias))


def test_there_is_a_loss_for_every_concept_image_and_timestep(base, concept, images):
    losses = fixed_batch_losses(Nothing(Recipe(), base, concept), base, images, seed=0)
    assert losses.shape == (len(images), len(TIMESTEPS)) and losses.isfinite().all()


def test_a_row_is_the_squared_error_at_its_timestep(base, concept, images):
    losses = fixed_batch_losses(Nothing(Recipe(), base, concept), base, images, seed=0)
    from personalize_core.randomness import generator_for

    z = images.concept[1][0, 0]
    noise = torch.randn(len(TIMESTEPS), *z.shape, generator=generator_for(0, "fixed batch", 1))[4]
    kept = base.scheduler.alphas_cumprod[TIMESTEPS[4]]
    x_t = kept.sqrt() * z + (1 - kept).sqrt() * noise
    context = base.encode(["a photo of a <v> dog"], concept)
    with torch.no_grad():
        answer = base.denoise(x_t[None], torch.tensor([TIMESTEPS[4]]), context)[0]
    expected = ((answer - noise).double().numpy() ** 2).mean()
    np.testing.assert_allclose(losses[1, 4].item(), expected, rtol=1e-4)


@pytest.mark.parametrize(("first", "timesteps"), [(0, TIMESTEPS), (800, tuple(range(810, 1000, 20)))])
def test_they_are_timesteps_that_the_method_trains_on(first, timesteps, base, concept):
    for name in ("textual_inversion", "xti", "neti"):
        kind: Any = method_class(name)
        assert timesteps_of(kind(kind.Config(min_timestep=first), base, concept)) == timesteps


def test_the_rows_stay_the_same_whatever_happens_between(base, concept, images):
    method = Nothing(Recipe(), base, concept)
    before, tensors = fixed_batch_losses(method, base, images, seed=0), snapshot(base)
    torch.manual_seed(5)
    torch.randn(3)
    assert torch.equal(fixed_batch_losses(method, base, images, seed=0), before)
    assert not torch.equal(fixed_batch_losses(method, base, images, seed=1), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in snapshot(base).items())


def test_training_that_teaches_something_brings_them_down(base, concept, images):
    method = Offset(base, concept)
    before = fixed_batch_losses(method, base, images, seed=0)
    train(method, base, images, seed=0)
    result = improvement(before, fixed_batch_losses(method, base, images, seed=0), seed=0)
    assert result["after"] < result["before"]
    assert result["rows"] == before.numel()


def test_the_fall_and_its_interval_are_those_of_the_paired_rows():
    generator = torch.Generator().manual_seed(0)
    before = 1 + torch.rand(4, 10, generator=generator)
    after = before - 0.1 - 0.02 * torch.randn(4, 10, generator=generator)
    result = improvement(before, after, seed=0)
    fell = (before - after).double().flatten().numpy()
    error = fell.std(ddof=1) / np.sqrt(fell.size)
    np.testing.assert_allclose(result["fell_by"], fell.mean(), rtol=1e-12)
    np.testing.assert_allclose(result["before"] - result["after"], fell.mean(), rtol=1e-6)
    low, high = result["interval_95"]
    # a bootstrap interval of a mean is near the normal one: 1.96 standard errors to either side
    assert low == pytest.approx(fell.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(fell.mean() + 1.96 * error, abs=0.2 * error)


def test_where_every_row_fell_alike_the_interval_has_no_width():
    rows = torch.arange(6.0).view(2, 3)
    for fall in (0.0, 0.5):
        result = improvement(rows, rows - fall, seed=0)
        assert (result["fell_by"], result["interval_95"]) == (fall, [fall, fall])
