"""What is true of every method as it samples. No test here knows a method's name."""

from __future__ import annotations

import copy

import torch

from personalize_core.methods.interface import count
from tests.conftest import disturbed, sample_latents
from tests.every_method.cases import of_learning, of_samplings


@of_learning
def test_each_learned_part_disturbed_alone_shows_in_the_image(case, base, concept):
    method = disturbed(case.make(base, concept))
    prompts, learned = [method.say("a photo of {} in the red")], copy.deepcopy(method.state_dict())
    expected = sample_latents(method, base, prompts, steps=1)
    for part, module in method.named_children():
        if count(module):
            changed = sample_latents(disturbed(method, starting=part, seed=12), base, prompts, steps=1)
            assert not torch.equal(changed, expected), part
            method.load_state_dict(learned)


@of_learning
def test_each_learned_tensor_has_a_part_in_the_prediction(case, concept):
    """By its gradient, as an image is sampled; on latents so large that no layer has a single location."""
    base = case.base()
    base.unet.register_to_config(sample_size=16)
    method = disturbed(case.make(base, concept)).eval().requires_grad_(True)
    noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(4))
    with method.attach(base):
        context = method.condition(base, [method.say("a photo of {} in the red")])(torch.tensor([500]))
        prediction = base.denoise(noise, torch.tensor([500]), context)
    gradients = torch.autograd.grad(prediction.pow(2).sum(), list(method.parameters()), allow_unused=True)
    names = [name for name, _ in method.named_parameters()]
    assert [n for n, g in zip(names, gradients, strict=True) if g is None or not g.abs().sum() > 0] == []


@of_samplings
def test_a_row_does_not_depend_on_the_other_rows(case, options, base, concept):
    method = disturbed(case.make(base, concept), by=case.moved)
    method.sampling = method.config.Sampling(**options)
    prompts = [method.say("a photo of {}"), method.say("red {} on the beach"), "the jungle"]
    together, first_two = sample_latents(method, base, prompts), sample_latents(method, base, prompts[:2])
    torch.testing.assert_close(together[:1], sample_latents(method, base, prompts[:1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:2], first_two, atol=1e-4, rtol=1e-4)
