"""Every method learns from exactly one concept image, by the recipe that it has for many."""

from __future__ import annotations

import pytest
import torch

from personalize_core.concepts.images import ConceptLatents
from personalize_core.randomness import generator_for
from personalize_core.training.loop import train
from tests.conftest import equal_bits, sample_latents
from tests.every_method.cases import of_learning


@pytest.fixture
def one_image(images) -> ConceptLatents:
    return ConceptLatents(images.concept[:1], images.class_images)


@of_learning
def test_steps_and_batches_are_those_of_several_concept_images(case, base, concept, images, one_image):
    method = case.make(base, concept)
    for stage in method.stages():
        alone, among = (method.batch(given, stage.batch_size, generator_for("rows")) for given in (one_image, images))
        assert alone.latents.shape == among.latents.shape and len(alone.prompts) == len(among.prompts)
        assert alone.weight.sum() == pytest.approx(among.weight.sum())
        # every row of the concept is that concept image, give or take the autoencoder's deviation
        mean, deviation = one_image.concept[0][0]
        assert ((alone.latents[: stage.batch_size] - mean) / deviation).abs().max() < 6


@of_learning
def test_it_trains_to_its_last_step_and_samples(case, base, concept, one_image):
    method = case.make(base, concept, steps=1)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    rows = train(method, base, one_image, seed=0)
    assert len(rows) == sum(stage.steps for stage in method.stages())
    assert not equal_bits(method.state_dict(), start)
    assert torch.isfinite(sample_latents(method, base, [method.say("a photo of {}")], steps=1)).all()
