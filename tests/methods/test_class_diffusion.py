"""ClassDiffusion holds the concept's phrase near the class noun's in the text encoder's space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from personalize_core.methods.class_diffusion.method import ClassDiffusion, Config
from personalize_core.training.loop import denoising_step, train
from tests.conftest import LAYERS, disturbed


def make(base, concept, **chosen) -> ClassDiffusion:
    return ClassDiffusion(Config(**{"steps": 3, "batch_size": 2, **chosen}), base, concept)


def features(base, words: list[str], vector: torch.Tensor | None = None) -> np.ndarray:
    """Of the end token, by transformers alone: the phrase's own ids, and the embedding in the table's row."""
    tokenizer, encoder = base.tokenizer._tokenizer, base.text_encoders["text_encoder"]
    ids = tokenizer(" ".join(words), return_tensors="pt").input_ids
    table = encoder.get_input_embeddings().weight
    rare = base.tokenizer.rare_id
    before = table[rare].detach().clone()
    with torch.no_grad():
        if vector is not None:
            table[rare] = vector
        hidden = encoder(input_ids=ids).last_hidden_state[0].double().numpy()
        table[rare] = before
    (end, *_) = (ids[0] == tokenizer.eos_token_id).nonzero().flatten().tolist()
    return hidden[end]


@pytest.mark.parametrize("noun", ["dog", "teddy bear"])
def test_the_loss_is_one_minus_the_cosine_of_the_two_phrases_end_tokens(noun, base, concept, images):
    concept = replace(concept, class_noun=noun)
    method = disturbed(make(base, concept, spl_weight=0.7)).train()
    (stage,) = method.stages()
    step = denoising_step(method, base, images, stage, seed=0, index=0)
    one = features(base, ["sks", noun], method.embedding.vector.detach())
    other = features(base, [noun])
    expected = 0.7 * (1 - one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
    assert stage.penalties(step)["semantic_preservation"].item() == pytest.approx(expected, rel=1e-4)
    part = stage.penalties(replace(step, share=0.25))["semantic_preservation"]
    assert part.item() == pytest.approx(0.25 * expected, rel=1e-4)
    assert expected > 1e-3


def test_it_reaches_the_embedding_and_no_weight_of_the_unet(base, concept, images):
    method = disturbed(make(base, concept)).train()
    (stage,) = method.stages()
    step = denoising_step(method, base, images, stage, seed=0, index=0)
    loss = stage.penalties(step)["semantic_preservation"]
    vector, *weights = torch.autograd.grad(loss, list(method.parameters()), allow_unused=True)
    assert vector is not None and vector.abs().sum() > 0
    assert all(gradient is None for gradient in weights)


def test_a_strong_loss_brings_the_phrases_together(base, concept, images):
    found = {}
    for weight in (0.0, 1e3):
        method = disturbed(make(base, concept, steps=30, lr=0.03, spl_weight=weight))
        train(method, base, images, seed=0)
        one, other = features(base, ["sks", "dog"], method.embedding.vector), features(base, ["dog"])
        found[weight] = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    assert 1 - found[1e3] < 0.5 * (1 - found[0.0])


def test_without_weight_there_is_no_such_loss(base, concept, images):
    method = make(base, concept, spl_weight=0.0).train()
    (stage,) = method.stages()
    assert stage.penalties(denoising_step(method, base, images, stage, seed=0, index=0)) == {}


def test_it_trains_keys_and_values_of_the_cross_attention_alone(base, concept):
    method = make(base, concept)
    expected = {f"{layer}.transformer_blocks.0.attn2.to_{kv}.weight" for layer in LAYERS for kv in "kv"}
    assert {name for name, _ in method.weights.items()} == expected
    assert torch.equal(method.embedding.vector, base.rare_embedding())  # the tiny vocabulary has no entry "ktn"


def test_rows_name_the_concept_before_its_class(base, concept, images):
    batch = make(base, concept).batch(images, 3, torch.Generator().manual_seed(0))
    assert batch.prompts == ["a photo of a <v> dog"] * 3
    assert batch.weight.flatten().tolist() == pytest.approx([1 / 3] * 3)


def test_the_recipe_is_the_launchers():
    c = Config()
    assert (c.steps, c.batch_size, c.lr, c.spl_weight) == (500, 2, 2 * 1e-5, 1.0)
    assert c.preprocessing.flip and not c.class_images_needed
