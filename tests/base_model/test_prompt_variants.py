"""Prompts are read with many embeddings as by a loop over the embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.prompt_reader import PromptReader
from personalize_core.base_model.prompt_variants import part_of
from personalize_core.base_model.text_encoders import TextEncoders
from personalize_core.concepts.concept import Concept
from tests.conftest import tiny_base

VARIANTS = 3
BATCHES = {
    "one": ["a photo of a <v>"],
    "several": ["a photo of a <v>", "<v> on the beach", "a red <v> in the jungle"],
    "one without": ["the desert", "a photo of a <v>"],
    "twice": ["a <v> beside a <v>", "a photo of a <v>"],
    "equal": ["a photo of a <v>"] * 2,
}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    """In float64, with the activation of Stable Diffusion 1 or 2."""
    made = tiny_base()
    (stock,) = made.text_encoders.values()
    made.text_encoders = TextEncoders({"text_encoder": _text_encoder(stock.config, request.param)})
    made.prompt_reader = PromptReader(made.tokenizer, made.text_encoders, made.device, False)
    return made


def _text_encoder(config: CLIPTextConfig, activation: str) -> Any:
    changed: Any = CLIPTextConfig(**{**config.to_dict(), "hidden_act": activation})
    torch.manual_seed(0)
    model: Any = CLIPTextModel(changed)
    with torch.no_grad():
        for weight in model.parameters():  # else biases are 0, and norms 1
            weight += 0.1 * torch.randn_like(weight)
    return model.double().requires_grad_(False).eval()


def embeddings_for(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(VARIANTS, rows, width, generator=generator, dtype=torch.float64).requires_grad_()


def one_by_one(base: BaseModel, prompts: list[str], concept: Concept, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The text encoder's last hidden states before its final layer norm, and behind it: transformers' own code."""
    before: list[Tensor] = []
    norm, behind = part_of(base.text_encoders["text_encoder"], "final_layer_norm"), []
    with hooked(norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))):
        for own in embeddings:
            table, tokens = base.text_encoders.tables[0], base.tokenizer(prompts, concept)
            here = tokens.placeholder[..., None]

            def put_in(module: Any, args: tuple, words: Tensor, here=here, own=own) -> Tensor:
                return torch.where(here, own[:, None], words)

            with hooked(table.register_forward_hook(put_in)):
                behind.append(base.text_encoders["text_encoder"](tokens.ids).last_hidden_state)
    return torch.stack(before), torch.stack(behind)


def weights_of(text: Tensor) -> Tensor:
    return torch.randn(text.shape, generator=torch.Generator().manual_seed(2), dtype=text.dtype)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
def test_values_and_gradients_are_those_of_one_pass_for_each_variant(base, concept, prompts, checkpointed):
    embeddings = embeddings_for(len(prompts), base.text_width)
    before, behind = one_by_one(base, prompts, concept, embeddings)
    with base.recomputing() if checkpointed else nullcontext():
        read = base.prompt_reader.encode_variants(prompts, concept, embeddings)
        ours = base.prompt_reader.final_norm(read.hidden)
        torch.testing.assert_close(read.hidden, before, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, behind, rtol=1e-10, atol=1e-12)
        (gradient,) = torch.autograd.grad((ours * weights_of(ours)).sum(), embeddings)
    (expected,) = torch.autograd.grad((behind * weights_of(behind)).sum(), embeddings)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


def test_one_embedding_for_all_prompts_is_as_that_one_for_each(base, concept):
    prompts = BATCHES["several"]
    own = embeddings_for(1, base.text_width)
    shared = base.prompt_reader.encode_variants(prompts, concept, own)
    each = base.prompt_reader.encode_variants(prompts, concept, own.expand(-1, len(prompts), -1))
    assert torch.equal(shared.hidden, each.hidden)


def test_it_says_where_the_placeholders_stand(base, concept):
    read = base.prompt_reader.encode_variants(BATCHES["twice"], concept, embeddings_for(2, base.text_width))
    here = torch.zeros(2, base.tokenizer.length, dtype=torch.bool)
    here[read.rows, read.positions] = True
    assert torch.equal(here, base.tokenizer(BATCHES["twice"], concept).placeholder)


def test_in_float32_it_is_equal_up_to_rounding(concept):
    base, prompts = tiny_base(), BATCHES["several"]
    embeddings = embeddings_for(len(prompts), base.text_width).float().detach().requires_grad_()
    _, behind = one_by_one(base, prompts, concept, embeddings)
    ours = base.prompt_reader.final_norm(base.prompt_reader.encode_variants(prompts, concept, embeddings).hidden)
    gradients = [torch.autograd.grad((text * weights_of(text)).sum(), embeddings)[0] for text in (ours, behind)]
    for one, other in ((ours, behind), tuple(gradients)):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_tokens_before_the_first_placeholder_are_read_once(base, concept, monkeypatch):
    """By how many tokens pass the last projection of a layer's attention."""
    prompts, tokens = BATCHES["several"][::2], []
    first = int(base.tokenizer(prompts, concept).placeholder.nonzero()[:, 1].min())
    assert first > 1
    module: Any = part_of(base.text_encoders["text_encoder"], "layers")
    for layer in module:
        projection, original = layer.self_attn.out_proj, layer.self_attn.out_proj.forward

        def counted(hidden: Tensor, original=original) -> Tensor:
            tokens.append(hidden.shape[:2].numel())
            return original(hidden)

        monkeypatch.setattr(projection, "forward", counted)  # no hook: with one, everything is read
        base.prompt_reader.encode_variants(prompts, concept, embeddings_for(2, base.text_width))
        monkeypatch.undo()
        once, each = 2 * first, 2 * VARIANTS * (base.tokenizer.length - first)
        assert tokens == [once, each]
        tokens.clear()


def test_who_looks_into_the_encoder_meets_every_token_of_every_variant(base):
    prompts, concept = BATCHES["several"], Concept("v", "<v>", "dog")
    embeddings, seen = embeddings_for(len(prompts), base.text_width).detach(), []
    expected = base.prompt_reader.encode_variants(prompts, concept, embeddings)
    table = base.text_encoders.tables[0]
    with hooked(table.register_forward_hook(lambda module, args, words: seen.append(words))):
        found = base.prompt_reader.encode_variants(prompts, concept, embeddings)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.positions, expected.positions)
    assert sum(len(words) for words in seen) == VARIANTS * len(prompts)
