"""Words are found among tokens by id, however many tokens they have and however the tokenizer pads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from personalize_core.base_model.text import PromptTokenizer, TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from tests.conftest import WORDS, tiny_base, tiny_tokenizer


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["padded as SD 1", "padded as SD 2"])
def tokenizer(request) -> PromptTokenizer:
    return PromptTokenizer(tiny_tokenizer(request.param), rare_word="sks")


def places(mask: torch.Tensor) -> list[list[int]]:
    """The columns that are True, row by row."""
    return [row.nonzero().flatten().tolist() for row in mask]


def test_the_words_of_the_tiny_tokenizer_are_single_tokens():
    tokenizer = tiny_tokenizer()
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in WORDS)


def test_a_prompt_is_found_word_by_word(tokenizer, concept):
    tokens = tokenizer(["a photo of <v> dog", "dog"], concept)
    assert tokens.ids.shape == (2, 77)
    assert places(tokens.placeholder) == [[4], []]
    assert places(tokens.class_noun) == [[5], [1]]
    assert places(tokens.words) == [[1, 2, 3, 4, 5], [1]]
    assert places(tokens.end) == [[6], [2]]


def test_the_placeholder_reads_as_the_rare_word(tokenizer, concept):
    said, plain = tokenizer(["a photo of <v> dog"], concept), tokenizer(["a photo of sks dog"])
    assert torch.equal(said.ids, plain.ids)


def test_a_class_noun_of_two_words_is_found_as_two_tokens(tokenizer):
    bear = Concept("bear7", "<bear7>", "teddy bear")
    tokens = tokenizer(["a photo of <bear7> teddy bear in the jungle", "a teddy bear on a bear"], bear)
    assert places(tokens.class_noun) == [[5, 6], [2, 3]]
    assert places(tokens.placeholder) == [[4], []]


def test_a_class_noun_of_many_tokens_is_found_whole(tokenizer):
    odd = Concept("odd", "<odd>", "xyz")
    assert len(tokenizer.class_noun_ids("xyz")) == 3
    assert places(tokenizer(["a <odd> xyz on a mug"], odd).class_noun) == [[3, 4, 5]]


def test_with_the_placeholder_only_the_noun_right_behind_it_counts(tokenizer, concept):
    tokens = tokenizer(["a dog on a <v> dog in a dog"], concept)
    assert places(tokens.class_noun) == [[6]]
    assert places(tokenizer(["a <v> on a dog"], concept).class_noun) == [[]]


def test_without_it_the_noun_counts_wherever_it_stands(tokenizer, concept):
    assert places(tokenizer(["a dog on a dog"], concept).class_noun) == [[2, 5]]


def test_every_placeholder_of_a_prompt_is_found(tokenizer, concept):
    assert places(tokenizer(["<v> on <v> dog"], concept).placeholder) == [[1, 3]]


def test_without_a_concept_no_token_is_its(tokenizer):
    tokens = tokenizer(["a photo of <v> dog"])
    assert not tokens.placeholder.any() and not tokens.class_noun.any()


def test_an_empty_prompt_has_no_words_and_one_end(tokenizer, concept):
    tokens = tokenizer([""], concept)
    assert places(tokens.words) == [[]] and places(tokens.end) == [[1]]
    assert not tokens.placeholder.any() and not tokens.class_noun.any()


def test_a_placeholder_may_contain_another_concepts_name(tokenizer):
    assert places(tokenizer(["a <dog7> on a <dog>"], Concept("dog", "<dog>", "mug")).placeholder)[0] != []
    assert len(places(tokenizer(["a <dog7> on a <dog>"], Concept("dog", "<dog>", "mug")).placeholder)[0]) == 1


def test_capitals_do_not_hide_the_class_noun(tokenizer, concept):
    assert places(tokenizer(["A Photo of <v> Dog"], concept).class_noun) == [[5]]


def test_the_longest_prompt_fits_and_one_more_token_is_refused_with_its_length(tokenizer, concept):
    assert places(tokenizer([" ".join(["red"] * 75)], concept).end) == [[76]]
    with pytest.raises(InputError, match="the prompt has 76 tokens, the base model reads 75; shorten it: 'red red"):
        tokenizer(["a dog", " ".join(["red"] * 76)], concept)


def test_a_rare_word_of_several_tokens_is_refused():
    with pytest.raises(InputError, match="'qwe' is 3 tokens .* must be one token"):
        PromptTokenizer(tiny_tokenizer(), rare_word="qwe")


def test_a_class_noun_that_keeps_its_tokens_is_accepted(tokenizer):
    for noun in ("dog", "teddy bear", "xyz"):
        tokenizer.check_class_noun(Concept("v", "<v>", noun))


def test_a_class_noun_that_the_tokenizer_does_not_know_is_refused_by_name():
    vocab = tiny_tokenizer().get_vocab()
    vocab["~~"] = vocab.pop("z</w>")  # a vocabulary without a final "z", as a very small one may be
    tokenizer = PromptTokenizer(CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77), rare_word="s")
    with pytest.raises(InputError, match="concept 'v': .* cannot place the class noun 'quiz'.* choose another word"):
        tokenizer.check_class_noun(Concept("v", "<v>", "quiz"))


# -- what the text encoder makes of it -------------------------------------------------------------------------


def test_a_learned_embedding_is_read_in_the_placeholders_place_and_nowhere_else(base, concept):
    rows = []
    with torch.no_grad():
        for scale in (0.0, 1.0):
            rows.append(base.encode(["a photo of <v> dog"], concept, torch.full((32,), scale)).hidden[0])
    changed = (rows[0] != rows[1]).any(dim=-1).nonzero().flatten().tolist()
    assert changed == list(range(4, 77))  # the encoder is causal: what stands before cannot see it


def test_it_is_read_as_if_it_stood_in_the_vocabulary(base, concept):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = base.encode(["a photo of <v> dog on a mug"], concept, vector).hidden
        base.text_encoders.tables[0].weight[base.tokenizer.rare_id] = vector
        assert torch.equal(base.encode(["a photo of <v> dog on a mug"], concept).hidden, expected)


def test_a_prompt_without_the_placeholder_reads_nothing_of_it(base, concept):
    with torch.no_grad():
        plain = base.encode(["a dog on the beach"], concept).hidden
        assert torch.equal(base.encode(["a dog on the beach"], concept, torch.ones(32)).hidden, plain)


def test_it_gets_gradient_from_the_prompts_that_it_stands_in(base, concept):
    vector = base.word_embedding("dog").requires_grad_()
    hidden = base.encode(["<v> on <v> dog", "a <v>", "a dog"], concept, vector).hidden[:, -1, 0]
    for row, reached in zip(hidden, (True, True, False), strict=True):
        (gradient,) = torch.autograd.grad(row, vector, retain_graph=True)
        assert gradient.isfinite().all() and bool(gradient.abs().sum() > 0) == reached


def test_reading_a_learned_embedding_leaves_no_hook_behind(base, concept):
    base.encode(["a <v>"], concept, torch.ones(32))
    assert not base.text_encoders.tables[0]._forward_hooks


def test_a_phrases_embedding_is_its_last_tokens():
    base = tiny_base()
    assert torch.equal(base.word_embedding("teddy bear"), base.word_embedding("bear"))
    assert not torch.equal(base.word_embedding("teddy bear"), base.word_embedding("teddy"))
    assert torch.equal(base.rare_embedding(), base.word_embedding("sks"))


# -- guidance --------------------------------------------------------------------------------------------------


def test_guidance_puts_the_empty_prompts_first_and_remembers_who_belongs_to_whom(base, concept):
    prompt, empty = base.encode(["a <v> dog", "a mug"], concept), base.encode(["", ""], concept)
    both = TextContext.guidance(empty, prompt)
    assert torch.equal(both.hidden, torch.cat([empty.hidden, prompt.hidden]))
    assert both.partner.tolist() == [2, 3, 2, 3]
    assert both.unconditional.tolist() == [True, True, False, False]
    assert prompt.unconditional.tolist() == [False, False]
    for name in ("placeholder", "class_noun", "words", "end"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(empty, name), getattr(prompt, name)]))


def test_the_words_of_the_concept_are_placeholder_and_noun_together(base, concept):
    assert places(base.encode(["a photo of <v> dog"], concept).concept) == [[4, 5]]


def layered(context: TextContext, seed: int) -> Any:
    """The same words, with a text of its own for each layer, for keys and for values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 16, *context.hidden.shape, generator=generator)
    return dataclasses.replace(context, layers=(keys, values))


def test_without_texts_per_layer_all_layers_read_the_same(base, concept):
    context = base.encode(["a photo of <v> dog"], concept)
    assert all(text is context.hidden for index in range(16) for text in context.layer(index))


def test_with_texts_per_layer_each_layer_reads_its_own_keys_and_values(base, concept):
    context = layered(base.encode(["a photo of <v> dog", "a dog"], concept), seed=0)
    for index in range(16):
        keys, values = context.layer(index)
        assert torch.equal(keys, context.layers[0][index]) and torch.equal(values, context.layers[1][index])


@pytest.mark.parametrize(("empty_layered", "prompt_layered"), [(True, True), (False, True), (True, False)])
def test_guidance_keeps_the_texts_per_layer_of_both_halves(empty_layered, prompt_layered, base, concept):
    empty, prompt = base.encode(["", ""], concept), base.encode(["a <v> dog", "the <v> dog"], concept)
    empty = layered(empty, seed=1) if empty_layered else empty
    prompt = layered(prompt, seed=2) if prompt_layered else prompt
    both = TextContext.guidance(empty, prompt)
    for index in range(16):
        for kind in (0, 1):
            expected = torch.cat([empty.layer(index)[kind], prompt.layer(index)[kind]])
            assert torch.equal(both.layer(index)[kind], expected)
