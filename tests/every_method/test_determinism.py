"""In deterministic mode torch refuses some operations on a GPU. No method needs one. No test knows a method's name."""

from __future__ import annotations

import pytest
import torch

from personalize_core.training.loop import train
from tests.conftest import disturbed, sample_latents
from tests.deterministic_kernels import OnlyDeterministic
from tests.every_method.cases import of_learning, of_samplings


@of_learning
def test_training_has_deterministic_kernels_on_a_gpu(case, concept, images):
    base = case.base()
    with OnlyDeterministic():
        train(case.make(base, concept, steps=1), base, images, seed=0)


@of_samplings
def test_sampling_has_deterministic_kernels_on_a_gpu(case, options, base, concept):
    method = disturbed(case.make(base, concept))
    method.sampling = method.config.Sampling(**options)
    with OnlyDeterministic():
        sample_latents(method, base, [method.say("a photo of {}")], steps=1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.median(dim=-1),
        lambda x: x.cumsum(dim=0),
        lambda x: torch.nn.functional.interpolate(x[None, None], scale_factor=2, mode="bilinear").sum().backward(),
    ],
)
def test_what_torch_refuses_is_found(compute):
    with OnlyDeterministic(), pytest.raises(AssertionError, match="no deterministic kernel"):
        compute(torch.randn(4, 4, requires_grad=True))
