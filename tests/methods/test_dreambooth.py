"""DreamBooth trains every weight of the U-Net, and keeps the class by images of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.dreambooth.method import Config, DreamBooth
from personalize_core.training.loop import denoising_step, diffusion_loss
from tests.conftest import disturbed, predict


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: DreamBooth(Config(steps=3, **chosen), base, concept)


def a_step(method, base, images):
    (stage,) = method.stages()
    with torch.no_grad():
        return denoising_step(method, base, images, stage, seed=0, index=0)


def rows_loss(step) -> np.ndarray:
    """The mean squared error of each row, in float64."""
    return ((step.prediction.double().numpy() - step.target.double().numpy()) ** 2).mean(axis=(1, 2, 3))


def test_prompts_are_the_recipes(make, images):
    batch = make(batch_size=2).batch(images, 2, torch.Generator())
    assert batch.prompts == ["a photo of <v> dog"] * 2 + ["a photo of dog"] * 2
    assert batch.latents.shape == (4, 4, 8, 8)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_with_prior_the_loss_is_the_sum_of_two_separate_means(size, weight, make, base, images):
    """As diffusers' script has it: chunk, two means, and the second times its weight."""
    step = a_step(make(batch_size=size, prior_weight=weight), base, images)
    prediction, prediction_prior = step.prediction.double().numpy().reshape(2, size, -1)
    target, target_prior = step.target.double().numpy().reshape(2, size, -1)
    expected = np.mean((prediction - target) ** 2) + weight * np.mean((prediction_prior - target_prior) ** 2)
    np.testing.assert_allclose(diffusion_loss(step).item(), expected, rtol=1e-5)


def test_without_prior_the_loss_is_the_plain_mean(make, base, images):
    step = a_step(make(prior_preservation=False, batch_size=3), base, images)
    assert len(step.batch.prompts) == 3
    np.testing.assert_allclose(diffusion_loss(step).item(), rows_loss(step).mean(), rtol=1e-5)


def test_other_class_images_leave_the_concepts_term_alone(make, base, images):
    method = make(batch_size=2)
    other = ConceptLatents(images.concept, [views + 1 for views in images.class_images])
    one, two = a_step(method, base, images), a_step(method, base, other)
    assert torch.equal(one.x_t[:2], two.x_t[:2]) and torch.equal(one.t, two.t)
    np.testing.assert_allclose(rows_loss(one)[:2], rows_loss(two)[:2], rtol=1e-6)
    assert not np.allclose(rows_loss(one)[2:], rows_loss(two)[2:])


def test_the_concepts_rows_are_the_same_with_and_without_prior(make, images):
    with_prior = make().batch(images, 2, torch.Generator().manual_seed(3))
    without = make(prior_preservation=False).batch(images, 2, torch.Generator().manual_seed(3))
    assert torch.equal(with_prior.latents[:2], without.latents)


def test_it_asks_for_class_images_only_if_it_uses_them():
    assert Config(class_images=30).class_images_needed == 30
    assert Config(prior_preservation=False).class_images_needed == 0


def test_every_weight_of_the_unet_is_trained_and_no_other(make, base):
    names = {name for name, _ in make().unet.items()}
    assert names == {name for name, _ in base.unet.named_parameters()}
    assert list(make().text_encoder.items()) == []


def test_the_text_encoder_is_trained_if_wished(make, base):
    names = {name for name, _ in make(train_text_encoder=True).text_encoder.items()}
    assert names == {name for name, _ in base.text_encoders["text_encoder"].named_parameters()}


def test_with_the_text_encoder_the_words_are_read_by_the_tuned_one(make, base, concept):
    method = make(train_text_encoder=True)
    context = base.encode(["a photo of <v> dog"], concept)
    disturbed(method.text_encoder)
    with method.attach(base), torch.no_grad():
        assert not torch.equal(method.condition(base, ["a photo of <v> dog"])(torch.tensor([0])).hidden, context.hidden)
    assert torch.equal(base.encode(["a photo of <v> dog"], concept).hidden, context.hidden)


def test_the_placeholder_reads_a_rare_words_embedding_that_is_not_trained(make, base, concept):
    said = make().condition(base, ["a photo of <v> dog"])(torch.tensor([0]))
    assert torch.equal(said.hidden, base.encode(["a photo of sks dog"]).hidden)


def test_what_was_learned_acts_on_every_prompt(make, base, concept):
    context = base.encode(["the desert"], concept)
    expected = predict(base, context)
    with disturbed(make()).attach(base):
        assert not torch.equal(predict(base, context), expected)


def test_the_recipe_is_diffusers_with_prior_preservation():
    """docs/methods.md#dreambooth: batch 1 + 1, 800 steps, 5e-6, 200 class images, lambda 1."""
    c = Config()
    assert (c.batch_size, c.steps, c.lr, c.class_images, c.prior_weight) == (1, 800, 5e-6, 200, 1.0)
    assert c.prior_preservation and not c.train_text_encoder


def test_concept_images_are_cropped_and_not_mirrored():
    """How the concept images are prepared, as the code does it."""
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("crop", "bilinear", False)
