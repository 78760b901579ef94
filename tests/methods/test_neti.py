"""NeTI puts a small network in the placeholder's place: another word for each timestep and each layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from personalize_core.base_model.layers import STABLE_DIFFUSION_LAYERS
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.methods.neti import method as neti
from personalize_core.methods.neti.method import HIDDEN, Config, Mapper, NeTI, Scaled, with_bypass
from personalize_core.methods.neti.recipe import Sampling
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import LAYERS, disturbed, predict, sample_latents

PROMPT, T = "a photo of a <v> on the beach", torch.tensor([37, 820])
VARIANTS = [
    Config(),
    Config(bypass=False),
    Config(positional_encoding=False),
    Config(rescale="per_half"),
    Config(rescale="none"),
    Config(time_anchors=4, sigma_t=0.1, sigma_l=1.0),
]
of_variants = pytest.mark.parametrize(
    "config", VARIANTS, ids=["default", "no bypass", "no encoding", "per half", "no rescaling", "other anchors"]
)


@pytest.fixture
def method(base, concept) -> Any:
    return disturbed(NeTI(Config(steps=3, batch_size=2), base, concept)).eval()


def a_mapper(config: Config, width: int = 6, norm: float = 3.0) -> Any:
    """In float64, with parameters away from where they start."""
    torch.manual_seed(0)
    return disturbed(Mapper(config, [width], 1000, torch.tensor(norm), 16)).double().eval()


# -- the mapper ------------------------------------------------------------------------------------------------


def naive_features(W: np.ndarray, t: float, layer: int) -> np.ndarray:
    x = np.array([t, layer], dtype=np.float64)
    v = np.concatenate([np.sin(W @ x), np.cos(W @ x)])
    return v / np.sqrt((v**2).sum())


def naive_layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def naive_mapper(mapper: Any, t: float, layer: int, keep: int = HIDDEN) -> np.ndarray:
    """docs/methods.md#neti, mapper architecture, steps 1 to 6, for one timestep and layer."""
    p = {name: tensor.detach().double().numpy() for name, tensor in mapper.state_dict().items()}
    if mapper.config.positional_encoding:
        x = p["anchors.weight"] @ naive_features(p["encode.W"], t, layer) + p["anchors.bias"]
    else:
        x = np.array([t / 999 * 2 - 1, layer / 15 * 2 - 1])
    for linear, norm in (("hidden.0", "hidden.1"), ("hidden.3", "hidden.4")):
        x = p[f"{linear}.weight"] @ x + p[f"{linear}.bias"]
        x = naive_layer_norm(x, p[f"{norm}.weight"], p[f"{norm}.bias"])
        x = np.where(x > 0, x, 0.01 * x)
    x = np.concatenate([x[:keep], np.zeros(HIDDEN - keep)])
    out = p["output.weight"] @ x + p["output.bias"]
    halves = {"joint": [out], "per_half": np.split(out, 2), "none": []}[mapper.config.rescale]
    for half in halves:
        half *= p["norm"] / np.sqrt((half**2).sum())
    return out


def said(mapper: Any, t: torch.Tensor, truncation: int | None = None) -> torch.Tensor:
    """Embedding and bypass side by side, (16, B, D or 2 D)."""
    parts = mapper(t, truncation)
    return torch.cat([part for part in parts if part is not None], dim=-1)


@of_variants
def test_the_mapper_is_the_codes(config):
    mapper = a_mapper(config)
    answer = said(mapper, T.double()).detach().numpy()
    assert answer.shape == (16, 2, 12 if config.bypass else 6)
    for layer in range(16):
        for row, t in enumerate(T.tolist()):
            np.testing.assert_allclose(answer[layer, row], naive_mapper(mapper, t, layer), rtol=1e-6, atol=1e-6)


@of_variants
def test_its_gradients_are_those_of_finite_differences(config):
    mapper, generator = a_mapper(config), np.random.default_rng(0)
    weights = generator.normal(size=12 if config.bypass else 6)
    loss = (said(mapper, T.double())[5, 1] * torch.from_numpy(weights)).sum()
    loss.backward()
    for name, parameter in mapper.named_parameters():
        place = tuple(int(generator.integers(size)) for size in parameter.shape)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[place] += step
            values.append(weights @ naive_mapper(mapper, int(T[1]), 5))
            with torch.no_grad():
                parameter[place] -= step
        difference = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(parameter.grad[place].item(), difference, rtol=1e-4, atol=1e-8, err_msg=name)


def test_the_frequencies_are_random_and_never_trained(base, concept, images):
    torch.manual_seed(0)
    method: Any = NeTI(Config(steps=2, batch_size=2), base, concept)
    W = method.mapper.encode.W.clone()
    assert W.shape == (1024, 2)
    np.testing.assert_allclose(W.std(dim=0).numpy(), [0.03, 2.0], rtol=0.1)
    assert abs(W.mean(dim=0) / W.std(dim=0)).max() < 0.1
    train(method, base, images, seed=0)
    assert torch.equal(method.mapper.encode.W, W)


def test_they_are_in_the_artifact_and_not_among_what_is_learned(method):
    assert {"mapper.encode.W", "mapper.norm"} <= method.state_dict().keys()
    assert not {"mapper.encode.W", "mapper.norm"} & {name for name, _ in method.named_parameters()}


def test_the_first_layer_starts_as_the_features_of_160_anchors():
    """t in 0, 100, ..., 900 in the outer loop, layers in the inner."""
    torch.manual_seed(0)
    mapper: Any = Mapper(Config(), [6], 1000, torch.tensor(1.0), 16)
    W = mapper.encode.W.double().numpy()
    expected = [naive_features(W, t, layer) for t in range(0, 1000, 100) for layer in range(16)]
    np.testing.assert_allclose(mapper.anchors.weight.detach().numpy(), np.stack(expected), atol=1e-5)


def test_without_fourier_features_t_and_layer_run_from_minus_one_to_one():
    corners = Scaled(1000, 16)(torch.tensor([0, 999, 0, 999]), torch.tensor([0, 0, 15, 15]))
    assert corners.tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_what_it_says_has_the_norm_of_the_class_nouns_embedding(base, concept, method):
    target = base.word_embedding("dog").norm()
    torch.testing.assert_close(said(method.mapper, T).norm(dim=-1), target.expand(len(LAYERS), 2))
    embedding, _ = method.mapper(T)
    assert (embedding.norm(dim=-1) < target).all()  # the joint vector has it, not the half (docs/methods.md#neti)


def test_or_each_half_has_it(base, concept):
    mapper = disturbed(NeTI(Config(rescale="per_half"), base, concept)).eval().mapper
    for half in mapper(T):
        torch.testing.assert_close(half.norm(dim=-1), base.word_embedding("dog").norm().expand(len(LAYERS), 2))


def test_a_class_noun_of_several_tokens_gives_the_norm_of_the_chosen_one(base):
    bear = Concept("b", "<b>", "teddy bear")
    last, first = (NeTI(Config(class_token_rule=rule), base, bear).mapper.norm for rule in ("last", "first"))
    assert torch.equal(last, base.word_embedding("bear").norm())
    assert torch.equal(first, base.word_embedding("teddy").norm())


# -- nested dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 50, 127])
def test_truncation_silences_the_units_from_there_on(units):
    mapper = a_mapper(Config())
    answer = said(mapper, T.double(), units)[9, 0].detach().numpy()
    np.testing.assert_allclose(answer, naive_mapper(mapper, int(T[0]), 9, keep=units), rtol=1e-6)


def test_truncation_at_128_is_none_and_at_0_only_the_last_bias_speaks():
    mapper = a_mapper(Config())
    assert torch.equal(said(mapper, T, HIDDEN), said(mapper, T))
    bias = mapper.output.bias
    torch.testing.assert_close(said(mapper, T, 0), (3 * bias / bias.norm()).expand(16, 2, -1), rtol=1e-6, atol=0)


def test_truncation_is_chosen_when_sampling(method, base):
    expected = sample_latents(method, base, [PROMPT])
    method.sampling = Sampling(truncation=20)
    assert not torch.equal(sample_latents(method, base, [PROMPT]), expected)
    with pytest.raises(ValidationError):
        Sampling(truncation=HIDDEN + 1)


def test_truncation_without_nested_dropout_is_refused():
    Config().check(Sampling(truncation=20))
    Config(nested_dropout=0.0).check(Sampling())
    with pytest.raises(InputError, match="truncation = 20 does nothing with nested_dropout: 0"):
        Config(nested_dropout=0.0).check(Sampling(truncation=20))


def kept_units(config: Config, rows: int, seed: int) -> np.ndarray:
    """(16, rows): how many units nested dropout leaves; fails unless they are the first ones."""
    mapper: Any = Mapper(config, [6], 1000, torch.tensor(1.0), 16)
    torch.manual_seed(seed)
    mask = mapper._nested_dropout(rows).numpy()
    kept = mask.sum(axis=-1)
    assert mask.shape == (16, rows, HIDDEN)
    assert np.array_equal(mask, np.arange(HIDDEN) < kept[..., None])
    return kept


def test_half_of_the_calls_are_cut_at_a_uniformly_sampled_unit():
    kept = np.concatenate([kept_units(Config(dropout_rows=1), 100, seed) for seed in range(5)])
    cut = kept[kept < HIDDEN]
    assert abs(len(cut) / kept.size - 0.5) < 5 * 0.5 / math.sqrt(kept.size)
    assert cut.min() == 0 and cut.max() == 127
    assert abs(cut.mean() - 63.5) < 5 * 37 / math.sqrt(len(cut))


def test_whether_a_call_is_cut_is_sampled_for_its_rows_together_and_where_for_each():
    """The code's batch is 2, and each layer is a call of its own (docs/methods.md#neti)."""
    kept = kept_units(Config(dropout_rows=2), 1001, seed=0)
    dropped = kept < HIDDEN
    pairs = dropped[:, :1000].reshape(16, 500, 2)
    assert np.array_equal(pairs[..., 0], pairs[..., 1])
    assert 0.45 < pairs[..., 0].mean() < 0.55
    assert (np.abs(np.corrcoef(pairs[..., 0].astype(float)) - np.eye(16)) < 0.25).all()  # layers know nothing of others
    cuts = kept[:, :1000].reshape(16, 500, 2)[pairs.all(axis=-1)]
    assert 0.9 < (cuts[:, 0] != cuts[:, 1]).mean() < 1


def test_nested_dropout_can_be_certain_or_off_and_is_off_in_sampling():
    certain, off = kept_units(Config(nested_dropout=1), 50, seed=1), kept_units(Config(nested_dropout=0), 50, seed=1)
    assert (certain < HIDDEN).all() and (off == HIDDEN).all()
    mapper = a_mapper(Config(nested_dropout=1))
    assert torch.equal(said(mapper, T), said(mapper, T))
    assert not torch.equal(said(mapper.train(), T), said(mapper.eval(), T))


def test_in_training_a_cut_row_is_a_truncated_one():
    mapper = a_mapper(Config()).train()
    torch.manual_seed(3)
    answer = said(mapper, T.double()).detach().numpy()
    torch.manual_seed(3)
    kept = mapper._nested_dropout(2).sum(dim=-1).tolist()
    assert len({units for row in kept for units in row}) > 3
    for layer in range(16):
        for row, t in enumerate(T.tolist()):
            expected = naive_mapper(mapper, t, layer, keep=kept[layer][row])
            np.testing.assert_allclose(answer[layer, row], expected, rtol=1e-6, atol=1e-9)


# -- what the layers read --------------------------------------------------------------------------------------


def test_the_bypass_is_a_fifth_of_the_hidden_states_length_in_its_own_direction():
    h, b = np.random.default_rng(0).normal(size=(2, 7, 5))
    expected = [
        state + 0.2 * np.linalg.norm(state) * push / np.linalg.norm(push) for state, push in zip(h, b, strict=True)
    ]
    answer = with_bypass(torch.from_numpy(h), torch.from_numpy(b))
    np.testing.assert_allclose(answer.numpy(), np.stack(expected), rtol=1e-12)


def test_the_gradient_of_the_bypass_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    h, b = (torch.randn(2, 4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(with_bypass, (h.requires_grad_(), b.requires_grad_()))


def by_hand(method: Any, base, layer: int, t: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys' and values' text of one layer and timestep: plain transformers, and NumPy for what stands behind it.

    The mapper's word stands in the vocabulary, as the rare word that every placeholder is read as.
    """
    embedding, bypass = (part[layer, 0] for part in method.mapper(torch.tensor([t])))
    tokens = base.tokenizer([text], method.concept)
    place = int(tokens.placeholder[0].nonzero())
    table = base.text_encoders.tables[0].weight
    before = table[base.tokenizer.rare_id].clone()
    with torch.no_grad():
        table[base.tokenizer.rare_id] = embedding
        output = base.text_encoders["text_encoder"](tokens.ids, output_hidden_states=True)
        table[base.tokenizer.rare_id] = before
    h = output.hidden_states[-1][0].double().numpy()
    norm: Any = base.prompt_reader.final_norm
    weight, bias = norm.weight.double().detach().numpy(), norm.bias.double().detach().numpy()
    b = bypass.double().detach().numpy()
    pushed = h.copy()
    pushed[place] += 0.2 * np.linalg.norm(h[place]) * b / np.linalg.norm(b)
    keys, values = (np.stack([naive_layer_norm(row, weight, bias, norm.eps) for row in text]) for text in (h, pushed))
    np.testing.assert_allclose(
        keys, output.last_hidden_state[0].detach().numpy(), atol=1e-4
    )  # h is what we take it for
    return keys, values


@torch.no_grad()
def test_keys_come_from_the_text_without_bypass_and_values_from_the_text_with_it(method, base):
    context = method.condition(base, [PROMPT])(torch.tensor([640]))
    for layer in range(len(LAYERS)):
        keys, values = context.layer(layer)
        expected_keys, expected_values = by_hand(method, base, layer, 640, PROMPT)
        np.testing.assert_allclose(keys[0].numpy(), expected_keys, atol=1e-4)
        np.testing.assert_allclose(values[0].numpy(), expected_values, atol=1e-4)


@torch.no_grad()
def test_they_differ_at_the_placeholder_alone(method, base):
    context = method.condition(base, [PROMPT, "a <v> dog"])(T)
    for layer in range(len(LAYERS)):
        keys, values = context.layer(layer)
        assert torch.equal((keys != values).any(dim=-1), context.placeholder)


@torch.no_grad()
def test_exchanging_them_changes_the_prediction(method, base):
    context = method.condition(base, [PROMPT])(torch.tensor([500]))
    keys, values = context.layers
    exchanged = dataclasses.replace(context, layers=(values, keys))
    assert not torch.equal(predict(base, exchanged), predict(base, context))


@torch.no_grad()
def test_without_bypass_they_are_the_same(base, concept):
    method = disturbed(NeTI(Config(bypass=False), base, concept)).eval()
    keys, values = method.condition(base, [PROMPT])(torch.tensor([500])).layers
    assert torch.equal(keys, values)


@torch.no_grad()
def test_every_layer_and_every_timestep_has_a_word_of_its_own(method, base):
    at = method.condition(base, [PROMPT])
    keys = at(torch.tensor([500])).layers[0]
    assert all(not torch.equal(keys[i], keys[j]) for i in range(len(LAYERS)) for j in range(i))
    assert not torch.equal(at(torch.tensor([501])).layers[0], keys)


@torch.no_grad()
def test_every_row_reads_the_word_of_its_own_timestep(method, base):
    together = method.condition(base, [PROMPT, "a photo of <v>"])(T).layers
    for row, prompt in enumerate([PROMPT, "a photo of <v>"]):
        alone = method.condition(base, [prompt])(T[row : row + 1]).layers
        for kind in (0, 1):
            torch.testing.assert_close(together[kind][:, row], alone[kind][:, 0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_words_before_the_placeholder_read_as_ever(method, base, concept):
    """The text encoder is causal."""
    context = method.condition(base, [PROMPT])(torch.tensor([500]))
    place, plain = int(context.placeholder[0].nonzero()), base.encode([PROMPT], concept).hidden
    for layer in range(len(LAYERS)):
        for text in context.layer(layer):
            torch.testing.assert_close(text[:, :place], plain[:, :place], atol=1e-5, rtol=0)
            assert not torch.equal(text[:, place:], plain[:, place:])


@torch.no_grad()
def test_a_prompt_without_the_concept_reads_as_the_base_model_does(method, base, concept):
    alone = method.condition(base, ["", "a red mug"])(T)
    assert alone.layers is None and torch.equal(alone.hidden, base.encode(["", "a red mug"], concept).hidden)
    beside = method.condition(base, ["a red mug", PROMPT])(T)
    for layer in range(len(LAYERS)):
        for text in beside.layer(layer):
            torch.testing.assert_close(text[0], alone.hidden[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_empty_half_of_guidance_reads_the_plain_empty_prompt_in_all_layers(method, base, concept):
    empty, prompt = (method.condition(base, [text])(T[:1]) for text in ("", PROMPT))
    both = TextContext.guidance(empty, prompt)
    for layer in range(len(LAYERS)):
        for kind in (0, 1):
            assert torch.equal(both.layer(layer)[kind][0], empty.hidden[0])
            assert torch.equal(both.layer(layer)[kind][1], prompt.layer(layer)[kind][0])


def test_a_prompt_that_mentions_the_concept_twice_is_refused(method, base):
    with pytest.raises(InputError, match="one '<v>' per prompt, and this has 2: 'a <v> beside a <v>'"):
        method.condition(base, ["a photo of <v>", "a <v> beside a <v>"])


# -- training --------------------------------------------------------------------------------------------------


def test_the_placeholder_stands_alone_in_one_of_27_templates(method, images):
    prompts = set(method.batch(images, 600, torch.Generator().manual_seed(0)).prompts)
    assert prompts == {template.replace("{}", "<v>") for template in method.templates} and len(prompts) == 27


def test_the_loss_is_the_plain_mean(method, base, images):
    (stage,) = method.stages()
    step = denoising_step(method, base, images, stage, seed=0, index=0)
    error = step.prediction.detach().double().numpy() - step.target.double().numpy()
    np.testing.assert_allclose(diffusion_loss(step).item(), np.mean(error**2), rtol=1e-5)


def gradients(method: Any, base, images) -> list[torch.Tensor]:
    (stage,) = method.stages()
    loss = diffusion_loss(denoising_step(method, base, images, stage, seed=0, index=0))
    return list(torch.autograd.grad(loss, list(method.parameters())))


def test_the_diffusion_loss_has_a_finite_gradient_on_every_parameter(method, base, images):
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients(method, base, images))


def test_gradient_checkpointing_changes_no_gradient(method, base, images):
    """The authors' code counts attention calls, and goes wrong by up to 62 % then."""
    expected = gradients(method, base, images)
    base.unet.enable_gradient_checkpointing()
    assert base.unet.is_gradient_checkpointing
    for one, other in zip(gradients(method, base, images), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_gradients_are_not_clipped(method):
    """docs/methods.md#neti: the code does not."""
    (stage,) = method.stages()
    assert stage.max_gradient_norm == math.inf


def test_it_trains_on_a_single_concept_image(method, base, images):
    log = train(method, base, ConceptLatents(images.concept[:1]), seed=0)
    assert len(log) == 3 and all(np.isfinite(row["diffusion"]) for row in log)


def test_rescaling_halves_needs_two():
    with pytest.raises(ValidationError, match="needs the bypass"):
        Config(bypass=False, rescale="per_half")


def test_the_recipe_is_the_codes():
    """docs/methods.md#neti: batch 2 accumulated 4 times, 1e-3 times 8, 1,000 steps; dropout 0.5; 10 anchors."""
    c = Config()
    assert (c.batch_size, c.dropout_rows, c.lr, c.steps) == (2 * 4, 2, pytest.approx(1e-3 * 2 * 4), 1000)
    assert (c.nested_dropout, c.time_anchors, c.sigma_t, c.sigma_l, neti.BYPASS) == (0.5, 10, 0.03, 2.0, 0.2)
    assert c.positional_encoding and c.bypass and c.rescale == "joint" and STABLE_DIFFUSION_LAYERS == 16


def test_concept_images_are_squashed_and_mirrored():
    """How the concept images are prepared, as the code does it."""
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("squash", "bicubic", True)


def test_there_is_no_public_format(method, base, tmp_path):
    with pytest.raises(InputError, match="no public format for what NeTI learns"):
        method.export(base, tmp_path)
