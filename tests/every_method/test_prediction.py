"""What a method predicts depends on its weights and its input alone. No test here knows a method's name."""

from __future__ import annotations

import torch
from torch import Tensor

from personalize_core.artifacts import saving
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from tests.conftest import disturbed, sample_latents
from tests.every_method.cases import of_alike, of_default

TIMESTEPS = [900, 40]


def predicted(method: Method, base: BaseModel, items: list[int]) -> Tensor:
    """Of noisy latents 0 and 1, each at a timestep of its own, those in `items`, computed as one batch."""
    noise = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(4))
    prompts = [method.say("a photo of {} in the red"), method.say("{} on the beach")]
    t = torch.tensor([TIMESTEPS[item] for item in items])
    with torch.no_grad(), method.attach(base):
        context = method.condition(base, [prompts[item] for item in items])(t)
        return base.denoise(noise[items], t, context)


@of_alike
def test_training_and_sampling_give_the_same_prediction(case, base, concept):
    """Else what is sampled is not what was trained: a mask or a hook that acts in one of the two alone."""
    method = disturbed(case.make(base, concept), by=case.moved).requires_grad_(False)
    training, sampling = (predicted(method.train(mode), base, [0, 1]) for mode in (True, False))
    torch.testing.assert_close(training, sampling, atol=1e-5, rtol=1e-5)


@of_default
def test_batch_items_at_different_timesteps_are_each_as_alone(case, base, concept):
    method = disturbed(case.make(base, concept), by=case.moved).requires_grad_(False).eval()
    alone = torch.cat([predicted(method, base, [item]) for item in (0, 1)])
    torch.testing.assert_close(predicted(method, base, [0, 1]), alone, atol=1e-4, rtol=1e-4)


@of_default
def test_an_artifact_restored_onto_a_bfloat16_base_model_samples_nearly_the_same(case, base, concept, tmp_path):
    method = disturbed(case.make(base, concept), by=case.moved).requires_grad_(False)
    saving.save(tmp_path, case.name, method, base, seed=0)
    half = case.base(dtype=torch.bfloat16)
    restored = saving.restore(tmp_path, half)
    assert {tensor.dtype for tensor in restored.state_dict().values()} <= {torch.float32}
    exact, near = predicted(method.eval(), base, [0, 1]), predicted(restored, half, [0, 1])
    assert torch.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 0.99
    assert sample_latents(restored, half, [restored.say("a photo of {}")]).isfinite().all()
