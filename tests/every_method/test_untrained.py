"""What is true of every method before its first step. No test here knows a method's name."""

from __future__ import annotations

import torch

from tests.conftest import predict, sample_latents, unpersonalized
from tests.every_method.cases import of_all, of_starting


@of_starting
def test_before_the_first_step_the_prediction_is_the_base_models(case, base, concept):
    method, context = case.make(base, concept), base.encode(["a photo of <v> dog", "a dog in the desert"], concept)
    expected = predict(base, context)
    with method.attach(base):
        torch.testing.assert_close(predict(base, context), expected, atol=1e-5, rtol=0)


@of_starting
def test_untrained_a_prompt_without_the_concept_is_sampled_as_by_the_base_model(case, base, concept):
    prompts = ["a photo of the desert", "a red mug"]
    expected = sample_latents(unpersonalized(base, concept), base, prompts)
    torch.testing.assert_close(sample_latents(case.make(base, concept), base, prompts), expected, atol=1e-5, rtol=0)


@of_all
def test_a_method_does_not_keep_the_base_model(case, base, concept):
    method = case.make(base, concept)
    parts = (base, base.unet, base.text_encoders, base.vae)
    assert not any(value is part for module in method.modules() for value in vars(module).values() for part in parts)
