"""The text of a prompt is kept as long as the text encoder would say it again, and not longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalize_core.base_model import kept_prompts
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.kept_prompts import KeptPrompts, Recent
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods.shared.tuned_weights import TunedWeights, parameter_names
from personalize_core.training.optimizers import make_optimizer
from tests.conftest import tiny_base

CONCEPT = Concept("v", "<v>", "dog")
PROMPTS = ["a photo of a <v> dog", "a photo of a dog", "a photo of a <v> dog", "a <v>"]


@pytest.fixture
def base() -> BaseModel:
    return tiny_base(False)


@pytest.fixture
def read(base, monkeypatch) -> list[int]:
    """How many rows each pass of the text encoder has had."""
    passes, forward = [], base.text_encoders["text_encoder"].forward

    def counted(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(ids))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(base.text_encoders["text_encoder"], "forward", counted)
    return passes


def naive(base: BaseModel, embedding: Tensor | None = None) -> Tensor:
    """All of `PROMPTS` in one pass, from the input embeddings on."""
    tokens, table = base.tokenizer(PROMPTS, CONCEPT), base.text_encoders.tables[0]
    inputs = table(tokens.ids)
    if embedding is not None:
        inputs[tokens.placeholder] = embedding
    with hooked(table.register_forward_hook(lambda *call: inputs)):
        return base.text_encoders["text_encoder"](tokens.ids).last_hidden_state


def test_kept_texts_are_what_the_encoder_says_and_are_read_once(base, read):
    for _ in range(2):
        context = base.encode(PROMPTS, CONCEPT)
        torch.testing.assert_close(context.hidden, naive(base), atol=1e-5, rtol=1e-4)
        assert not context.hidden.requires_grad
    tokens = base.tokenizer(PROMPTS, CONCEPT)
    for name in ("placeholder", "class_noun", "words", "end"):
        assert torch.equal(getattr(context, name), getattr(tokens, name)), name
    assert [rows for rows in read if rows != len(PROMPTS)] == [1, 1, 1]


def test_a_learned_embedding_gets_the_gradient_of_every_row(base, read):
    embedding = torch.randn(base.text_width, requires_grad=True)
    weights = torch.randn(len(PROMPTS), base.tokenizer.length, base.text_width)
    (base.encode(PROMPTS, CONCEPT, embedding).hidden * weights).sum().backward()
    assert sorted(read) == [1, 2]  # the prompt without the placeholder, and both with it at once
    found, embedding.grad = embedding.grad, None
    (naive(base, embedding) * weights).sum().backward()
    torch.testing.assert_close(found, embedding.grad, atol=1e-4, rtol=1e-4)


def test_the_bits_do_not_depend_on_what_was_read_before(base):
    alone = [tiny_base(False).encode([prompt], CONCEPT).hidden for prompt in PROMPTS]
    base.encode(PROMPTS[::-1], CONCEPT)
    assert torch.equal(base.encode(PROMPTS, CONCEPT).hidden, torch.cat(alone))


def test_what_is_kept_cannot_be_changed_through_what_was_handed_out(base):
    before = base.encode(PROMPTS, CONCEPT).hidden
    expected = before.clone()
    before.zero_()
    assert torch.equal(base.encode(PROMPTS, CONCEPT).hidden, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "by hand"])
def test_an_embedding_that_has_changed_is_read_again(base, optimizer):
    embedding = nn.Parameter(torch.randn(base.text_width))
    with torch.no_grad():
        before = base.encode(PROMPTS, CONCEPT, embedding).hidden
        assert torch.equal(base.encode(PROMPTS, CONCEPT, embedding).hidden, before)
    if optimizer == "by hand":
        with torch.no_grad():
            embedding.neg_()  # not a constant more: layer norms take that off again
    else:
        embedding.grad = torch.randn(base.text_width)
        make_optimizer("adamw", [{"params": [embedding], "lr": 1.0}]).step()
    with torch.no_grad():
        after = base.encode(PROMPTS, CONCEPT, embedding).hidden
        torch.testing.assert_close(after, naive(base, embedding), atol=1e-5, rtol=1e-4)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_another_embedding_is_read_for_itself(base):
    one, other = torch.randn(2, base.text_width)
    texts = [base.encode(PROMPTS, CONCEPT, embedding).hidden for embedding in (one, other, one.clone(), None)]
    assert torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0][0], texts[1][0])
    torch.testing.assert_close(texts[3], naive(base), atol=1e-5, rtol=1e-4)


def test_other_weights_are_read_with_and_afterwards_the_base_models_again(base):
    before = base.encode(PROMPTS, CONCEPT).hidden
    tuned = TunedWeights(base.text_encoders, parameter_names(base.text_encoders))
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.1 * torch.randn_like(weight)
    with tuned.requires_grad_(False).eval().placed_in(base.text_encoders):
        during = base.encode(PROMPTS, CONCEPT).hidden
        torch.testing.assert_close(during, naive(base), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(during, before)
    assert torch.equal(base.encode(PROMPTS, CONCEPT).hidden, before)


def test_weights_that_are_trained_are_read_with_every_time_and_get_the_gradient_of_every_row(base, read):
    tuned = TunedWeights(base.text_encoders, parameter_names(base.text_encoders)).train()
    with tuned.placed_in(base.text_encoders):
        for _ in range(2):
            base.encode(PROMPTS, CONCEPT)
        assert read == [3, 3]
        base.encode(PROMPTS, CONCEPT).hidden.sum().backward()
        found = {name: weight.grad for name, weight in tuned.items() if weight.grad is not None}
        tuned.zero_grad()
        naive(base).sum().backward()
        for name, weight in tuned.items():
            torch.testing.assert_close(found.get(name), weight.grad, atol=1e-3, rtol=1e-3)


def test_where_a_hook_changes_the_encoder_nothing_is_kept(base):
    before = base.encode(PROMPTS, CONCEPT).hidden
    layer = next(module for module in base.text_encoders["text_encoder"].modules() if isinstance(module, nn.Linear))
    with hooked(layer.register_forward_hook(lambda layer, args, output: torch.mul(output, 2))):  # type: ignore[arg-type]
        changed = base.encode(PROMPTS, CONCEPT).hidden
    assert not torch.allclose(changed, before)
    assert torch.equal(base.encode(PROMPTS, CONCEPT).hidden, before)


@pytest.mark.parametrize("frees", [lambda base: base.move("cpu"), lambda base: base.give_back_memory()])
def test_moving_the_base_model_and_giving_back_memory_forget_the_texts(base, read, frees):
    base.encode(PROMPTS[:1], CONCEPT)
    frees(base)
    base.encode(PROMPTS[:1], CONCEPT)
    assert read == [1, 1]


def test_no_more_prompts_are_kept_than_that_and_those_used_last(base, read, monkeypatch):
    monkeypatch.setattr(kept_prompts, "MOST_PROMPTS", 2)
    base.prompt_reader.kept = KeptPrompts(base.text_encoders["text_encoder"])
    for word in ("dog", "cat", "dog", "tree", "dog", "cat"):
        base.encode([f"a {word}"])
    assert len(read) == 4  # the cat went for the tree


def test_recent_values_stay():
    recent: Recent[int] = Recent(2)
    recent.keep("a", 1)
    recent.keep("b", 2)
    assert recent.get("a") == 1
    recent.keep("c", 3)
    assert (recent.get("a"), recent.get("b"), recent.get("c"), len(recent)) == (1, None, 3, 2)
