"""Textual Inversion learns one input embedding, from prompts that hold the placeholder alone."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from personalize_core.concepts.concept import Concept
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.errors import InputError
from personalize_core.methods.shared.options import TokenRule
from personalize_core.methods.textual_inversion.method import Config, TextualInversion
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import disturbed, sample_latents


@pytest.fixture
def method(base, concept):
    return TextualInversion(Config(steps=3), base, concept)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_placeholder_stands_alone(method):
    assert method.say("a photo of a {}") == "a photo of a <v>"


def test_it_starts_from_the_class_noun_by_its_last_token(base, concept):
    dog = TextualInversion(Config(), base, concept).embedding.vector
    assert torch.equal(dog, base.text_encoders.tables[0].weight[base.tokenizer.class_noun_ids("dog")[0]])
    bear = TextualInversion(Config(), base, Concept("b", "<b>", "teddy bear")).embedding.vector
    assert torch.equal(bear, base.word_embedding("bear"))


def test_another_token_of_the_class_noun_or_their_mean_can_be_chosen(base):
    """A class noun may have several tokens."""
    start: dict[str, torch.Tensor] = {}
    for rule in get_args(TokenRule):
        method = TextualInversion(Config(class_token_rule=rule), base, Concept("b", "<b>", "teddy bear"))
        start[rule] = method.embedding.vector.detach()
    teddy, bear = base.word_embedding("teddy"), base.word_embedding("bear")
    assert torch.equal(start["first"], teddy) and torch.equal(start["last"], bear)
    torch.testing.assert_close(start["mean"], (teddy + bear) / 2)


def test_untrained_it_reads_as_the_class_noun(method, base, concept):
    with torch.no_grad():
        said = method.condition(base, ["a photo of <v> on the beach"])(torch.tensor([0])).hidden
        assert torch.equal(said, base.encode(["a photo of dog on the beach"], concept).hidden)


def test_prompts_are_sampled_from_the_27_templates_by_the_generator(method, images):
    """The list is diffusers' and NeTI's (docs/methods.md#textual-inversion)."""
    assert len(set(method.templates)) == len(method.templates) == 27
    prompts = method.batch(images, 600, generator()).prompts
    assert set(prompts) == {template.replace("{}", "<v>") for template in method.templates}
    assert prompts == method.batch(images, 600, generator()).prompts
    assert prompts != method.batch(images, 600, generator(1)).prompts
    counts = [prompts.count(prompt) for prompt in set(prompts)]
    assert max(counts) < 22 + 5 * 4.7  # binomial: mean 600 / 27, deviation 4.6


def test_every_image_counts_alike(method, images):
    batch = method.batch(images, 4, generator())
    assert batch.latents.shape == (4, 4, 8, 8)
    assert batch.weight.flatten().tolist() == [0.25] * 4


def test_another_list_of_templates_can_be_chosen_and_an_unknown_one_is_refused(base, concept):
    with pytest.raises(InputError, match="no prompt list 'ti_objects' in .*; there are .*ti_object_27"):
        TextualInversion(Config(templates="ti_objects"), base, concept)


def test_the_templates_for_styles_are_diffusers(base):
    """docs/methods.md#textual-inversion: 19 of them, two of which stand there twice."""
    method = TextualInversion(Config(templates="ti_style_19"), base, Concept("s", "<s>", "jungle"))
    assert len(method.templates) == 19 and len(set(method.templates)) == 17
    assert all(template.endswith(" in the style of {}") for template in method.templates)
    assert method.say(method.templates[0]) == "a painting in the style of <s>"
    assert not set(method.templates) & set(read_list(TRAINING / "ti_object_81.txt"))


def test_the_diffusion_loss_has_a_finite_gradient_on_the_embedding(method, base, images):
    (stage,) = method.stages()
    assert stage.max_gradient_norm == math.inf  # neither code clips gradients
    loss = diffusion_loss(denoising_step(method, base, images, stage, seed=0, index=0))
    (gradient,) = torch.autograd.grad(loss, method.embedding.vector)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_training_leaves_every_row_of_the_vocabulary_as_it_was(method, base, images):
    table = base.text_encoders.tables[0].weight
    before, start = table.clone(), method.embedding.vector.detach().clone()
    train(method, base, images, seed=0)
    assert torch.equal(table, before)
    assert not torch.equal(method.embedding.vector, start)


def test_the_embedding_in_the_vocabulary_samples_the_same_image(method, base, concept):
    """The row of a token that stands in the placeholder's place, instead of the hook."""
    disturbed(method)
    expected = sample_latents(method, base, ["a photo of <v> on the beach"])
    table = base.text_encoders.tables[0].weight
    with torch.no_grad():
        table[base.tokenizer.rare_id] = method.embedding.vector
    plain = TextualInversion(Config(), base, Concept("other", "<other>", "mug"))
    assert torch.equal(sample_latents(plain, base, ["a photo of sks on the beach"]), expected)


def test_concept_images_are_squashed_and_mirrored():
    """How the concept images are prepared, as the code does it."""
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("squash", "bicubic", True)


def test_the_recipe_is_diffusers():
    """docs/methods.md#textual-inversion: batch 4 x 1 accumulated, 3,000 steps, 2e-3."""
    assert Config() == Config(steps=3000, batch_size=4, lr=2e-3, templates="ti_object_27")
