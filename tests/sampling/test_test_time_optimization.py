"""The words around a concept are to mean what they mean around its class noun; also for one prompt, at test time."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from personalize_core.artifacts import saving
from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import METHOD_NAMES, method_class, recipe_class
from personalize_core.methods.shared.context_regularizer import (
    Axis,
    ContextLosses,
    PromptPair,
    context_attention_loss,
    context_embedding_loss,
    context_losses,
)
from personalize_core.methods.textual_inversion.method import TextualInversion
from personalize_core.sampling.test_time_optimization import ContextRefined, Refinement, embedding_name
from tests.conftest import LAYERS, disturbed, equal_bits, sample_latents, snapshot, tiny_base

PROMPT = "a photo of <v> in the jungle"


@pytest.fixture
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture
def bear() -> Concept:
    return Concept("b", "<b>", "teddy bear")


def noisy(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x_t = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    return x_t, torch.linspace(100, 900, rows).long()


# -- which tokens correspond -----------------------------------------------------------------------------------


def words_at(base, prompt, concept, positions) -> list[str]:
    tokenizer: Any = base.tokenizer._tokenizer
    return tokenizer.convert_ids_to_tokens(base.tokenizer([prompt], concept).ids[0][positions].tolist())


def test_the_context_is_everything_up_to_the_first_end_token_without_the_concept(base, concept):
    pair = PromptPair.of(base, concept, "a photo of {} in the jungle", "<v>")
    assert (pair.concept_prompt, pair.class_prompt) == ("a photo of <v> in the jungle", "a photo of dog in the jungle")
    expected = ["<|startoftext|>", *(f"{word}</w>" for word in "a photo of in the jungle".split()), "<|endoftext|>"]
    assert words_at(base, pair.concept_prompt, concept, pair.concept_positions) == expected
    assert pair.concept_positions.tolist() == pair.class_positions.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("phrase", ["<b>", "<b> teddy bear"])
def test_a_class_noun_of_two_tokens_aligns_word_by_word(phrase, base, bear):
    pair = PromptPair.of(base, bear, "red {} in the jungle", phrase)
    one = words_at(base, pair.concept_prompt, bear, pair.concept_positions)
    other = words_at(base, pair.class_prompt, bear, pair.class_positions)
    assert one == other == ["<|startoftext|>", "red</w>", "in</w>", "the</w>", "jungle</w>", "<|endoftext|>"]
    assert pair.class_positions.tolist() == [0, 1, 4, 5, 6, 7]
    assert pair.concept_positions.tolist() == [0, 1, *([3, 4, 5, 6] if phrase == "<b>" else [5, 6, 7, 8])]


def test_the_class_noun_elsewhere_in_the_template_is_context(base, concept):
    pair = PromptPair.of(base, concept, "dog in the jungle on {} of dog", "<v>")
    assert words_at(base, pair.class_prompt, concept, pair.class_positions).count("dog</w>") == 2
    assert pair.class_positions.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_a_concept_at_either_end_of_the_prompt_aligns(base, bear):
    first, last = (PromptPair.of(base, bear, template, "<b>") for template in ("{} in the jungle", "a photo of {}"))
    assert (first.concept_positions.tolist(), first.class_positions.tolist()) == ([0, 2, 3, 4, 5], [0, 3, 4, 5, 6])
    assert (last.concept_positions.tolist(), last.class_positions.tolist()) == ([0, 1, 2, 3, 5], [0, 1, 2, 3, 6])


def test_a_prompt_that_names_the_concept_twice_or_never_is_refused(base, concept):
    with pytest.raises(InputError, match="must name it once, not 2 times: 'a <v> on the <v>'"):
        PromptPair.of(base, concept, "a {} on the <v>", "<v>")
    with pytest.raises(InputError, match="must name it once, not 0 times"):
        PromptPair.of(base, concept, "the desert", "<v>")


def test_a_concept_that_melts_into_the_next_word_is_refused(base, concept):
    with pytest.raises(InputError, match="not the same tokens in 'two <v>s' and 'two dogs'"):
        PromptPair.of(base, concept, "two {}s", "<v>")


# -- the embedding loss (eq. 3) --------------------------------------------------------------------------------


@pytest.fixture
def contexts() -> tuple[torch.Tensor, torch.Tensor]:
    """(m, D) of either prompt."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)


def naive_embedding_loss(ours: np.ndarray, others: np.ndarray, axis: str) -> float:
    """1 - the mean cosine: of each token's features (eq. 3), or of each feature's tokens (the released code)."""
    lists = zip(ours, others, strict=True) if axis == "feature" else zip(ours.T, others.T, strict=True)
    cosines = [np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for a, b in lists]
    return 1 - sum(cosines) / len(cosines)


@pytest.mark.parametrize("axis", ["token", "feature"])
def test_the_embedding_loss_is_one_minus_a_mean_cosine_over_the_chosen_axis(axis, contexts):
    ours, others = contexts
    expected = naive_embedding_loss(ours.double().numpy(), others.double().numpy(), axis)
    np.testing.assert_allclose(context_embedding_loss(ours, others, axis).item(), expected, rtol=1e-5)


@pytest.mark.parametrize("axis", ["token", "feature"])
def test_its_gradient_is_that_of_finite_differences_and_reaches_the_concept_alone(axis, contexts):
    ours, others = (tensor.requires_grad_() for tensor in contexts)
    gradient, none = torch.autograd.grad(context_embedding_loss(ours, others, axis), contexts, allow_unused=True)
    assert none is None
    array, fixed = ours.detach().double().numpy().copy(), others.detach().double().numpy()
    numeric = np.zeros_like(array)
    for place in np.ndindex(*array.shape):
        before = array[place]
        array[place] = before + 1e-6
        above = naive_embedding_loss(array, fixed, axis)
        array[place] = before - 1e-6
        numeric[place] = (above - naive_embedding_loss(array, fixed, axis)) / 2e-6
        array[place] = before
    np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-6)


def test_the_two_axes_are_not_the_same_loss(contexts):
    ours, others = contexts
    assert context_embedding_loss(ours, others, "token") != context_embedding_loss(ours, others, "feature")


def test_it_ignores_the_length_of_what_it_compares_along_its_axis(contexts):
    ours, others = contexts
    for axis, scale in (("feature", torch.rand(5, 1) + 0.5), ("token", torch.rand(1, 7) + 0.5)):
        kind: Any = axis
        torch.testing.assert_close(
            context_embedding_loss(ours * scale, others, kind), context_embedding_loss(ours, others, kind)
        )


def test_words_before_the_concept_contribute_nothing(base, concept):
    """The text encoder is causal, so they are the same in both prompts, whatever the embedding."""
    pair = PromptPair.of(base, concept, "a photo of {} in the jungle", "<v>")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = base.encode([pair.concept_prompt], concept, vector).hidden[0, pair.concept_positions]
        others = base.encode([pair.class_prompt], concept).hidden[0, pair.class_positions]
    losses = [context_embedding_loss(ours[i : i + 1], others[i : i + 1], "feature").item() for i in range(8)]
    assert torch.equal(ours[:4], others[:4]) and losses[:4] == pytest.approx([0] * 4, abs=1e-6)
    assert min(losses[4:]) > 1e-4


def test_along_the_token_axis_the_words_before_the_concept_count(base, concept):
    """Though alike in both prompts they are part of every cosine there. Along the feature axis each token has a cosine
    of its own, and theirs is 1.
    """
    pair = PromptPair.of(base, concept, "a photo of {} in the jungle", "<v>")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = base.encode([pair.concept_prompt], concept, vector).hidden[0, pair.concept_positions]
        others = base.encode([pair.class_prompt], concept).hidden[0, pair.class_positions]
    moved_ours, moved_others = ours.clone(), others.clone()
    moved_ours[:4] += 1  # other words before the concept, the same in both prompts
    moved_others[:4] += 1
    before, after = (
        {axis: context_embedding_loss(*both, axis).item() for axis in get_args(Axis)}
        for both in ((ours, others), (moved_ours, moved_others))
    )
    assert after["feature"] == pytest.approx(before["feature"], abs=1e-6) and before["feature"] > 1e-5
    assert abs(after["token"] - before["token"]) > 0.1 * before["token"]


# -- the attention loss (eq. 4) --------------------------------------------------------------------------------


@pytest.fixture
def maps(base, concept) -> tuple[AttentionMaps, AttentionMaps, PromptPair]:
    """Of the two prompts under the same noisy latents; the maps are cut off from each other."""
    pair = PromptPair.of(base, concept, "a photo of {} in the jungle", "<v>")
    x_t, t = noisy(3)
    recorded = []
    for prompt, embedding in ((pair.concept_prompt, base.word_embedding("mug")), (pair.class_prompt, None)):
        seen, leaves = AttentionMaps(), AttentionMaps()
        with torch.no_grad():
            base.denoise(x_t, t, base.encode([prompt] * 3, concept, embedding), seen)
        for layer in LAYERS:
            query, key = seen._query_key[layer]
            leaves.record(layer, (3 * query).requires_grad_(), (3 * key).requires_grad_())
        recorded.append(leaves)
    return recorded[0], recorded[1], pair


def naive_attention_loss(ours: dict, others: dict, pair: PromptPair, pool: str, reduction: str) -> float:
    """Eq. 4 and the code's reading of it, one row, layer and token at a time, from queries and keys in float64."""

    def probabilities(query: np.ndarray, key: np.ndarray) -> np.ndarray:  # (H, N, L)
        scores = np.einsum("hnd,hld->hnl", query, key) / np.sqrt(query.shape[-1])
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    rows = []
    for b in range(3):
        p = [probabilities(q[b], k[b]) for q, k in ours.values()]
        p_class = [probabilities(q[b], k[b]) for q, k in others.values()]
        squares = []
        for i, j in zip(pair.concept_positions.tolist(), pair.class_positions.tolist(), strict=True):
            values, class_values = [m[..., i].ravel() for m in p], [m[..., j].ravel() for m in p_class]
            if pool == "all":
                values, class_values = [np.concatenate(values)], [np.concatenate(class_values)]
            squares.append([(v.mean() - w.mean()) ** 2 for v, w in zip(values, class_values, strict=True)])
        rows.append(np.mean(squares))
    return float(np.sum(rows) if reduction == "sum" else np.mean(rows))


def in_float64(maps: AttentionMaps) -> dict[str, list[np.ndarray]]:
    return {layer: [t.detach().double().numpy().copy() for t in maps._query_key[layer]] for layer in LAYERS}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("pool", ["layer", "all"])
def test_the_attention_loss_is_eq_4_as_a_plain_loop_computes_it(pool, reduction, maps):
    ours, others, pair = maps
    expected = naive_attention_loss(in_float64(ours), in_float64(others), pair, pool, reduction)
    loss = context_attention_loss(ours, others, LAYERS, pair, pool, reduction)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-3)


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_its_gradient_is_that_of_finite_differences_and_reaches_the_concepts_prompt_alone(pool, maps):
    ours, others, pair = maps
    layers = [LAYERS[0], LAYERS[1], LAYERS[-1]]
    leaves = [t for layer in layers for t in ours._query_key[layer]]
    of_class = [t for layer in LAYERS for t in others._query_key[layer]]
    gradients = torch.autograd.grad(
        context_attention_loss(ours, others, LAYERS, pair, pool, "sum"), leaves + of_class, allow_unused=True
    )
    assert all(gradient is None for gradient in gradients[len(leaves) :])
    arrays, fixed, generator = in_float64(ours), in_float64(others), np.random.default_rng(0)
    flat = [array for layer in layers for array in arrays[layer]]
    for array, gradient in zip(flat, gradients, strict=False):
        direction, before = generator.standard_normal(array.shape), array.copy()
        array += 1e-4 * direction
        above = naive_attention_loss(arrays, fixed, pair, pool, "sum")
        array[:] = before - 1e-4 * direction
        numeric = (above - naive_attention_loss(arrays, fixed, pair, pool, "sum")) / 2e-4
        array[:] = before
        np.testing.assert_allclose((gradient.double().numpy() * direction).sum(), numeric, rtol=1e-2)
        assert abs(numeric) > 1e-9


# -- both, as training and refining use them -------------------------------------------------------------------


def losses_of(base, concept, vector, how: ContextLosses, template: str = "a photo of {} in the jungle"):
    pair, (x_t, t) = PromptPair.of(base, concept, template, concept.placeholder), noisy()
    context = base.encode([pair.concept_prompt] * 2, concept, vector)
    return context_losses(how, base, concept, pair, lambda t: context, x_t, t)


@pytest.mark.parametrize("pool", ["layer", "all"])
@pytest.mark.parametrize("axis", ["token", "feature"])
def test_both_are_zero_where_the_concept_is_the_class_noun(axis, pool, base, concept):
    how = ContextLosses(cer_weight=1.0, car_weight=1.0, cer_axis=axis, car_pool=pool)
    same = losses_of(base, concept, base.word_embedding("dog"), how)
    other = losses_of(base, concept, base.word_embedding("mug"), how)
    assert set(same) == {"context_embedding", "context_attention"}
    assert all(abs(loss.item()) < 1e-6 for loss in same.values()) and same["context_attention"] == 0
    assert other["context_embedding"] > 1e-3 and other["context_attention"] > 1e-9


def test_each_counts_with_its_weight_and_a_weight_of_zero_costs_nothing(base, concept, monkeypatch):
    vector, calls = base.word_embedding("mug"), []
    denoise = base.denoise
    monkeypatch.setattr(base, "denoise", lambda *args: calls.append(torch.is_grad_enabled()) or denoise(*args))
    unit = losses_of(base, concept, vector, ContextLosses(cer_weight=1.0, car_weight=1.0))
    both = losses_of(base, concept, vector, ContextLosses(cer_weight=2.0, car_weight=3.0))
    assert both["context_embedding"].item() == pytest.approx(2 * unit["context_embedding"].item())
    assert both["context_attention"].item() == pytest.approx(3 * unit["context_attention"].item())
    assert calls == [True, False] * 2  # the class prompt's pass needs no gradient
    calls.clear()
    assert set(losses_of(base, concept, vector, ContextLosses(car_weight=0.0))) == {"context_embedding"}
    assert calls == []
    assert set(losses_of(base, concept, vector, ContextLosses(cer_weight=0.0))) == {"context_attention"}
    assert calls == [True, False]


def test_each_has_a_gradient_on_the_embedding_and_none_on_the_model(base, concept):
    vector = base.word_embedding("mug").requires_grad_()
    how = ContextLosses(cer_weight=1.0, car_weight=1.0)
    for name, loss in losses_of(base, concept, vector, how).items():
        (gradient,) = torch.autograd.grad(loss, vector, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    assert not any(p.requires_grad for part in (base.unet, base.text_encoders) for p in part.parameters())


def test_the_gradient_of_attention_comes_by_keys_and_by_later_layers_queries(base, concept):
    vector = base.word_embedding("mug").requires_grad_()
    maps, (x_t, t) = AttentionMaps(), noisy()
    base.denoise(x_t, t, base.encode([PROMPT] * 2, concept, vector), maps)
    for number, layer in enumerate(LAYERS):
        query, key = maps._query_key[layer]
        assert key.requires_grad and query.requires_grad == (number > 0)


def test_the_prompts_of_a_two_token_class_noun_are_compared_where_they_correspond(base, bear):
    """As naively taken out of the two encodings by their words' places."""
    vector = base.word_embedding("mug")
    how = ContextLosses(cer_weight=1.0, car_weight=0.0, cer_axis="feature")
    loss = losses_of(base, bear, vector, how, "red {} in the jungle")["context_embedding"].item()
    with torch.no_grad():
        ours = base.encode(["red <b> in the jungle"], bear, vector).hidden[0].double().numpy()
        others = base.encode(["red teddy bear in the jungle"], bear).hidden[0].double().numpy()
    assert loss == pytest.approx(
        naive_embedding_loss(ours[[0, 1, 3, 4, 5, 6]], others[[0, 1, 4, 5, 6, 7]], "feature"), rel=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "chosen", "why"),
    [
        (ContextLosses, {"cer_weight": 0, "cer_axis": "feature"}, "shapes the context embedding loss, which is off"),
        (ContextLosses, {"car_weight": 0, "car_pool": "all"}, "shape the context attention loss, which is off"),
        (ContextLosses, {"car_weight": 0, "car_batch": "mean"}, "shape the context attention loss, which is off"),
        (Refinement, {"car_weight": 0, "cer_weight": 0}, "would refine nothing"),
        (Refinement, {"car_weight": 0, "car_pool": "all"}, "shape the context attention loss, which is off"),
    ],
)
def test_choices_that_contradict_each_other_are_refused_in_a_sentence(kind, chosen, why):
    with pytest.raises((InputError, ValidationError), match=why):
        kind(**chosen)


# -- test-time optimization ------------------------------------------------------------------------------------

STEEP = Refinement(steps=3, batch_size=2, lr=3e-2)  # so that few steps can be seen


def make(name: str, base: BaseModel, concept: Concept) -> Any:
    kind: Any = method_class(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return disturbed(kind(kind.Config(), base, concept)).eval()


def learns_an_embedding(name: str) -> bool:
    try:
        embedding_name(make(name, tiny_base(), Concept("v", "<v>", "dog")))
    except InputError:
        return False
    return True


REFINABLE = [name for name in METHOD_NAMES if learns_an_embedding(name)]
of_refinable = pytest.mark.parametrize("name", REFINABLE)
of_others = pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in REFINABLE])


def recipes(name: str) -> list[Any]:
    """A method's own recipe, and that of each of its ablations."""
    kind: Any = recipe_class(name)
    return [kind(), *(kind(**dict(ablation.changes)) for ablation in kind.ablations.values())]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_what_a_method_says_of_its_embeddings_is_what_there_is_to_refine(name, concept):
    """`text_embeddings` answers before anything is built; here everything is."""
    base, kind = tiny_base(), method_class(name)
    for config in recipes(name):
        try:
            found = bool(embedding_name(kind(config, base, concept)))
        except InputError:
            found = False
        assert found == (config.text_embeddings == 1), config


@pytest.fixture
def refined(base, concept, images) -> Any:
    return ContextRefined(make("textual_inversion", base, concept), images, 0, STEEP)


def test_it_refines_every_method_of_the_paper_that_learns_an_embedding():
    assert set(REFINABLE) >= {"textual_inversion", "ti_db", "attn_dreambooth", "core"}


@of_others
def test_a_method_without_an_embedding_has_nothing_to_refine(name, base, concept, images):
    method = make(name, base, concept)
    with pytest.raises(InputError, match=f"{type(method).__name__} learns .* text embeddings?, so"):
        ContextRefined(method, images, 0)


def test_oft_says_so_in_a_sentence(base, concept, images):
    expected = "OFT learns no text embedding, so there is nothing to refine for a prompt"
    with pytest.raises(InputError, match=expected):
        ContextRefined(make("oft", base, concept), images, 0)


def test_the_recipe_is_the_codes():
    """docs/methods.md#core: 10 steps, batch 6, 5e-4, CoRe's weights."""
    assert Refinement() == Refinement(
        cer_weight=1.5e-4, car_weight=0.05, cer_axis="token", steps=10, batch_size=6, lr=5e-4
    )


@of_refinable
def test_it_samples_another_image_and_leaves_artifact_and_base_model_alone(name, base, concept, images, tmp_path):
    method = make(name, base, concept)
    learned, model = {k: v.clone() for k, v in method.state_dict().items()}, snapshot(base)
    flags = [parameter.requires_grad for parameter in method.parameters()]
    prompts = [method.say("a photo of {} in the jungle"), "a red mug"]
    plain = sample_latents(method, base, prompts)
    refined = sample_latents(ContextRefined(method, images, 0, STEEP), base, prompts)
    assert not torch.equal(refined[0], plain[0])
    torch.testing.assert_close(refined[1], plain[1], atol=1e-5, rtol=0)  # it does not speak of the concept
    assert equal_bits(method.state_dict(), learned) and equal_bits(snapshot(base), model)
    assert [parameter.requires_grad for parameter in method.parameters()] == flags
    assert all(parameter.grad is None for parameter in method.parameters())
    assert torch.equal(sample_latents(method, base, prompts), plain)


@of_refinable
def test_it_brings_down_the_losses_of_the_prompt_under_the_weights_that_sample(name, base, concept, images):
    method = make(name, base, concept)
    how = Refinement(steps=6, batch_size=2, lr=5e-2, car_weight=500.0, cer_weight=0.1)
    wrapper, prompt = ContextRefined(method, images, 0, how), method.say("a photo of {} in the jungle")
    sample_latents(wrapper, base, [prompt])
    pair, (x_t, t) = PromptPair.of(base, concept, "a photo of {} in the jungle", method.phrase), noisy(2)
    totals = []
    for vector in (wrapper.embedding.vector, wrapper.refined[prompt]):
        with method.attach(base), torch.no_grad(), wrapper.embedding.reading(vector):
            losses = context_losses(how, base, concept, pair, method.condition(base, [prompt] * 2), x_t, t)
        totals.append(sum(loss.item() for loss in losses.values()))
    assert totals[1] < totals[0]
    assert len(wrapper.losses[prompt]) == 6  # each under its own noise, so they need not fall from step to step


def test_a_step_is_adamws_on_the_two_losses_alone(base, concept, images):
    """Loshchilov & Hutter 2019, first step: m / sqrt(v) is g / |g|; no clipping, no diffusion loss, no rescaling."""
    method = make("core", base, concept)
    how = Refinement(steps=1, batch_size=2, lr=1e-2, car_weight=1e6, cer_weight=10.0)
    wrapper = ContextRefined(method, images, 0, how)
    seen: list[tuple] = []
    noisy_images = wrapper._noisy
    wrapper._noisy = lambda *args: seen.append(noisy_images(*args)) or seen[-1]  # type: ignore[method-assign]
    sample_latents(wrapper, base, [PROMPT])
    start = method.embedding.vector.detach().clone().requires_grad_()
    pair = PromptPair.of(base, concept, "a photo of {} in the jungle", "<v>")
    with method.attach(base):
        context = base.encode([PROMPT] * 2, concept, start)
        losses = context_losses(how, base, concept, pair, lambda t: context, *seen[0])
        (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), start)
    g, v = gradient.double().numpy(), start.detach().double().numpy()
    expected = v - 1e-2 * 1e-2 * v - 1e-2 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(wrapper.refined[PROMPT].numpy(), expected, atol=1e-5)
    assert len(seen) == 1 and seen[0][0].shape == (2, 4, 8, 8)


def test_a_image_depends_on_seed_and_prompt_and_not_on_the_other_rows(base, concept, images, refined):
    other = "red <v> on the beach"
    alone = sample_latents(refined, base, [PROMPT])
    fresh = ContextRefined(refined.method, images, 0, STEEP)
    torch.manual_seed(99)  # the global stream has no part in it
    beside = sample_latents(fresh, base, [PROMPT, other])
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(fresh.refined[PROMPT], refined.refined[PROMPT])
    assert not torch.equal(fresh.refined[PROMPT], fresh.refined[other])
    seeded = ContextRefined(refined.method, images, 1, STEEP)
    sample_latents(seeded, base, [PROMPT])
    assert not torch.equal(seeded.refined[PROMPT], refined.refined[PROMPT])


def test_every_step_of_every_prompt_looks_under_noise_of_its_own(base, refined, monkeypatch):
    seen, noisy_images = [], refined._noisy
    monkeypatch.setattr(refined, "_noisy", lambda *args: seen.append(noisy_images(*args)) or seen[-1])
    sample_latents(refined, base, [PROMPT, "red <v> on the beach"])
    assert len(seen) == 2 * STEEP.steps
    assert all(not torch.equal(one[0], other[0]) for one, other in itertools.combinations(seen, 2))
    assert len({tuple(t.tolist()) for _, t in seen}) > STEEP.steps


class Late(TextualInversion):
    """Reads its embedding only when it is asked for a timestep, as a text that depends on time would be read."""

    def condition(self, base, prompts):
        return lambda t: base.encode(prompts, self.concept, self.embedding.vector)


def test_a_text_that_is_read_at_each_timestep_is_read_with_the_refined_embedding(base, concept, images, refined):
    late = Late(refined.method.config, base, concept).eval()
    late.load_state_dict(refined.method.state_dict())
    assert torch.equal(
        sample_latents(ContextRefined(late, images, 0, STEEP), base, [PROMPT]), sample_latents(refined, base, [PROMPT])
    )


def test_a_prompt_is_refined_once_for_all_its_images(base, refined):
    two = sample_latents(refined, base, [PROMPT, PROMPT])
    first = refined.refined[PROMPT]
    again = sample_latents(refined, base, [PROMPT])
    assert refined.refined[PROMPT] is first and list(refined.refined) == [PROMPT]
    torch.testing.assert_close(again, two[:1], atol=1e-5, rtol=1e-5)


def test_prompts_can_be_refined_beforehand_with_progress_and_are_then_sampled_the_same(base, concept, images, refined):
    prompts, heard = [PROMPT, "red <v> on the beach", PROMPT, "a red mug"], []
    expected = sample_latents(refined, base, prompts)
    fresh = ContextRefined(refined.method, images, 0, STEEP)
    fresh.refine(base, prompts, lambda done, steps, loss: heard.append((done, steps, loss)))
    assert [(done, steps) for done, steps, _ in heard] == [(n + 1, 2 * STEEP.steps) for n in range(2 * STEEP.steps)]
    assert [loss for _, _, loss in heard] == fresh.losses[PROMPT] + fresh.losses["red <v> on the beach"]
    assert torch.equal(sample_latents(fresh, base, prompts), expected)
    before = len(heard)
    fresh.refine(base, prompts, lambda done, steps, loss: heard.append((done, steps, loss)))
    assert len(heard) == before  # what is known is not refined again


def test_each_row_is_sampled_with_its_own_embedding(base, concept, refined):
    """The two rows together read what a Textual Inversion of each vector would read alone."""
    prompts = [PROMPT, "red <v> on the beach"]
    with torch.no_grad():
        context = refined.condition(base, prompts)(torch.tensor([500, 500]))
        for row, prompt in enumerate(prompts):
            own = base.encode([prompt], concept, refined.refined[prompt])
            torch.testing.assert_close(context.hidden[row : row + 1], own.hidden)


def test_it_refines_under_the_weights_that_sample_and_not_under_the_base_models(base, concept, images):
    method = make("core", base, concept)
    tuned, untuned = ContextRefined(method, images, 0, STEEP), ContextRefined(method, images, 0, STEEP)
    sample_latents(tuned, base, [PROMPT])
    untuned.condition(base, [PROMPT])  # not attached: the U-Net is the base model's
    assert not torch.equal(tuned.refined[PROMPT], untuned.refined[PROMPT])


def test_sampling_options_go_to_the_method(base, concept, images):
    method = make("attn_dreambooth", base, concept)
    wrapper = ContextRefined(method, images, 0, STEEP)
    wrapper.sampling = method.config.Sampling(after_stage="embedding")
    assert method.sampling.after_stage == "embedding"
    assert wrapper.say("{}") == "<v> dog" and wrapper.concept is concept


def test_a_prompt_that_says_the_placeholder_without_the_class_noun_is_refined_too(base, concept, images):
    wrapper = ContextRefined(make("attn_dreambooth", base, concept), images, 0, STEEP)
    sample_latents(wrapper, base, [PROMPT])
    assert set(wrapper.refined) == {PROMPT}


def test_a_prompt_that_names_the_concept_twice_is_refused_before_it_is_sampled(base, refined):
    with pytest.raises(InputError, match="must name it once, not 2 times"):
        sample_latents(refined, base, ["a <v> on the <v>"])


def test_what_it_wraps_is_saved_as_if_it_had_not_been_wrapped(base, concept, images, tmp_path):
    method = make("textual_inversion", base, concept)
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        saving.save(tmp_path / folder, "textual_inversion", method, base, seed=0)
        sample_latents(ContextRefined(method, images, 0, STEEP), base, [PROMPT])
    files = [(tmp_path / folder / "weights.safetensors").read_bytes() for folder in ("before", "after")]
    assert files[0] == files[1]


def test_it_has_no_stages_of_its_own_and_no_export(base, refined, tmp_path):
    with pytest.raises(NotImplementedError, match="ContextRefined does not say what it trains"):
        refined.stages()
    with pytest.raises(InputError, match="cannot be exported"):
        refined.export(base, tmp_path)


def test_a_loss_that_is_not_finite_stops_it(base, concept, images):
    method = make("textual_inversion", base, concept)
    with torch.no_grad():
        method.embedding.vector.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="test-time optimization, step 0: the loss is nan"):
        sample_latents(ContextRefined(method, images, 0, STEEP), base, [PROMPT])


def test_it_works_where_the_unet_runs_in_bfloat16(concept, images):
    base = tiny_base(dtype=torch.bfloat16)
    wrapper = ContextRefined(make("core", base, concept), images, 0, STEEP)
    assert sample_latents(wrapper, base, [PROMPT]).isfinite().all()
    assert wrapper.refined[PROMPT].dtype == torch.float32
    assert not torch.equal(wrapper.refined[PROMPT], wrapper.embedding.vector)


def test_gradient_checkpointing_refines_the_same(base, refined):
    expected = sample_latents(refined, base, [PROMPT])
    vector = refined.refined.pop(PROMPT)
    with base.recomputing():
        assert torch.equal(sample_latents(refined, base, [PROMPT]), expected)
    assert torch.equal(refined.refined[PROMPT], vector)


def test_a_pair_is_a_value(base, concept):
    """Nothing of it can be changed after it was checked."""
    pair = PromptPair.of(base, concept, "a photo of {}", "<v>")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.concept_prompt = "another"  # type: ignore[misc]
