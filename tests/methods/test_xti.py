"""XTI learns an embedding for each of the cross-attention layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from personalize_core.base_model.hooks import hooked
from personalize_core.concepts.concept import Concept
from personalize_core.methods.textual_inversion.method import Config as InversionConfig
from personalize_core.methods.textual_inversion.method import TextualInversion
from personalize_core.methods.xti.method import XTI, Config
from personalize_core.training.loop import denoising_step, diffusion_loss
from tests.conftest import LAYERS, disturbed, sample_latents

PROMPTS = ["a photo of a <v>", "the desert", "a red <v> on the beach"]


@pytest.fixture
def method(base, concept) -> Any:
    return XTI(Config(steps=3), base, concept).eval()


def test_it_starts_as_textual_inversion_does(method, base, concept):
    inversion = TextualInversion(InversionConfig(), base, concept)
    assert method.embeddings.shape == (len(LAYERS), 32)
    assert all(torch.equal(row, inversion.embedding.vector) for row in method.embeddings)
    torch.testing.assert_close(
        sample_latents(method, base, PROMPTS), sample_latents(inversion, base, PROMPTS), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("rule", ["last", "first", "mean"])
def test_all_sixteen_start_from_the_token_that_is_chosen(rule, base):
    bear = Concept("b", "<b>", "teddy bear")
    inversion = TextualInversion(InversionConfig(class_token_rule=rule), base, bear)
    for row in XTI(Config(class_token_rule=rule), base, bear).embeddings:
        assert torch.equal(row, inversion.embedding.vector)


def test_each_layer_reads_the_prompt_as_encoded_with_its_own_embedding(method, base, concept):
    """Keys and values alike; the layers by their names, the embeddings in the order in which they run."""
    disturbed(method)
    read: dict[tuple[str, str], torch.Tensor] = {}
    handles = []
    for layer, block in base.transformers.items():
        attention: Any = block.transformer_blocks[0].attn2
        for name in ("to_k", "to_v"):

            def keep(module, args, key=(layer, name)) -> None:
                read[key] = args[0]

            handles.append(getattr(attention, name).register_forward_pre_hook(keep))
    context = method.condition(base, PROMPTS)(torch.tensor([500]))
    with hooked(*handles), torch.no_grad():
        base.denoise(torch.zeros(3, 4, 8, 8), torch.full((3,), 500), context)
        for index, layer in enumerate(LAYERS):
            expected = base.encode(PROMPTS, concept, method.embeddings[index]).hidden
            torch.testing.assert_close(read[layer, "to_k"], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(read[layer, "to_v"], expected, atol=1e-5, rtol=0)


def test_equal_prompts_are_encoded_once_and_teach_as_often_as_they_stand_there(method, base, concept, monkeypatch):
    disturbed(method)
    prompts, read, encode = [PROMPTS[0], PROMPTS[2], PROMPTS[0]], [], base.prompt_reader.encode_variants
    monkeypatch.setattr(
        base.prompt_reader, "encode_variants", lambda said, *args: read.append(said) or encode(said, *args)
    )
    texts = method.condition(base, prompts)(torch.tensor([500])).layers[0]
    assert read == [[PROMPTS[0], PROMPTS[2]]]
    own = method.embeddings.detach().clone().requires_grad_()
    expected = torch.stack([base.encode(prompts, concept, embedding).hidden for embedding in own])
    torch.testing.assert_close(texts, expected, atol=1e-5, rtol=0)
    weights = torch.randn(texts.shape, generator=torch.Generator().manual_seed(0))
    (ours,) = torch.autograd.grad((texts * weights).sum(), method.embeddings)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), own)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_prompt_without_the_concept_is_encoded_once(method, base):
    context = method.condition(base, ["the desert"])(torch.tensor([500]))
    assert context.layers is None


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_an_embedding_acts_in_its_layer_alone(index, method, base):
    before = method.condition(base, PROMPTS)(torch.tensor([500])).layers[0]
    with torch.no_grad():
        method.embeddings[index] += 1
    after = method.condition(base, PROMPTS)(torch.tensor([500])).layers[0]
    changed = [layer for layer in range(len(LAYERS)) if not torch.equal(before[layer], after[layer])]
    assert changed == [index]
    assert torch.equal(after[index][1], before[index][1])  # the row of the desert


def test_the_diffusion_loss_reaches_every_embedding(method, base, images):
    (stage,) = method.stages()
    assert stage.max_gradient_norm == math.inf  # neither code clips gradients
    loss = diffusion_loss(denoising_step(method.train(), base, images, stage, seed=0, index=0))
    (gradient,) = torch.autograd.grad(loss, method.embeddings)
    assert gradient.isfinite().all() and (gradient.abs().sum(dim=1) > 0).tolist() == [True] * len(LAYERS)


def test_in_all_else_it_is_textual_inversion(method, base, concept, images):
    inversion = TextualInversion(InversionConfig(), base, concept)
    ours, theirs = (m.batch(images, 4, torch.Generator().manual_seed(2)) for m in (method, inversion))
    assert ours.prompts == theirs.prompts and torch.equal(ours.latents, theirs.latents)
    assert method.phrase == inversion.phrase and Config().preprocessing == InversionConfig().preprocessing


def test_the_recipe_is_the_papers_as_far_as_it_is_known():
    """docs/methods.md#xti."""
    assert Config() == Config(steps=500, batch_size=8, lr=5e-3, templates="ti_object_27")
