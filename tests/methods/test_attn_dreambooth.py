"""AttnDreamBooth learns in three stages, and keeps the placeholder attended to as its class noun is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods.attn_dreambooth.method import AttnDreamBooth, Config
from personalize_core.methods.attn_dreambooth.recipe import Sampling
from personalize_core.training.loop import diffusion_loss, train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, a_step, disturbed, equal_bits, predict, sample_latents, states_of_stages, tiny_base

SHORT: dict[str, Any] = {
    **{f"{stage}_steps": 2 for stage in ("embedding", "attention", "unet")},
    **{f"{stage}_batch_size": 2 for stage in ("embedding", "attention", "unet")},
}
STEEP = {"embedding_lr": 0.1, "attention_lr": 1e-2, "unet_lr": 1e-3}  # so that two steps can be seen
REGULARIZED = [
    f"{stage}_{kind}_weight" for stage in ("embedding", "attention", "unet") for kind in ("mean", "variance")
]
UNREGULARIZED: dict[str, Any] = dict.fromkeys(REGULARIZED, 0.0)


def short(**chosen: Any) -> Config:
    """Two steps a stage, two rows a step."""
    return Config(**(SHORT | chosen))


@pytest.fixture
def base() -> BaseModel:
    """Of one kind of projection, for nothing here touches them; tests/every_method has both."""
    return tiny_base()


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: AttnDreamBooth(short(**chosen), base, concept)


@pytest.fixture
def bear() -> Concept:
    return Concept("b", "<b>", "teddy bear")


# -- the stages ------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    """docs/methods.md#attndreambooth: learning rate, steps, batch, lambda_mu and lambda_sigma of each stage."""
    c: Any = Config()
    table = [
        tuple(getattr(c, f"{stage}_{key}") for key in ("lr", "steps", "batch_size", "mean_weight", "variance_weight"))
        for stage in ("embedding", "attention", "unet")
    ]
    assert table == [(1e-3, 60, 8, 0.1, 0), (2e-5, 100, 8, 2, 5), (2e-6, 500, 8, 2, 5)]
    assert (c.reg_pool, c.reg_batch, c.class_token_rule, c.rotate) == ("layer", "sum", "last", True)


def test_each_stage_trains_what_the_paper_says_with_its_own_settings(make, base):
    method = make()
    embedding, attention, unet = method.stages()
    assert [stage.name for stage in method.stages()] == ["embedding", "attention", "unet"]
    names = {id(weight): name for name, weight in method.unet.items()}
    (trained,) = ([names[id(p)] for p in group["params"]] for group in attention.param_groups)
    kinds = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    assert set(trained) == {f"{layer}.transformer_blocks.0.attn2.{kind}" for layer in LAYERS for kind in kinds}
    assert embedding.param_groups[0]["params"] == [method.embedding.vector]
    assert {names[id(p)] for p in unet.param_groups[0]["params"]} == {name for name, _ in base.unet.named_parameters()}
    rates = [stage.param_groups[0]["lr"] for stage in method.stages()]
    assert rates == [1e-3, 2e-5, 2e-6] and all(stage.batch_size == 2 for stage in method.stages())


def test_in_each_stage_only_its_own_tensors_change(make, base, images):
    method = make(**STEEP)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    after = states_of_stages(method, base, images)
    changed = []
    for stage in ("embedding", "attention", "unet"):
        now = after[stage]
        changed.append({name for name in before if not torch.equal(before[name], now[name])})
        before = now
    learned = {name for name in before if name.startswith("unet.")}
    kept = {name for name in before if name.startswith("after_attention.")}
    of_attention = {name for name in learned if "/attn2/" in name}
    assert changed[0] == {"embedding.vector"}
    assert changed[1] - kept == of_attention  # not one convolution, norm or self-attention
    assert changed[2] - kept == learned
    for name in kept:  # copied between the second stage's last step and the third's first
        own = name.replace("after_attention.", "unet.weights.")
        assert torch.equal(after["unet"][name], after["attention"][own])


def test_prompts_say_placeholder_and_class_noun_in_every_stage(make, images):
    batch = make().batch(images, 3, torch.Generator())
    assert batch.prompts == ["a photo of a <v> dog"] * 3 and batch.weight.flatten().tolist() == pytest.approx(
        [1 / 3] * 3
    )


def test_with_prior_preservation_as_many_images_of_the_class_come_on_top(make, images):
    batch = make(prior_preservation=True, prior_weight=0.5).batch(images, 2, torch.Generator())
    assert batch.prompts == ["a photo of a <v> dog"] * 2 + ["a photo of a dog"] * 2
    assert batch.weight.flatten().tolist() == pytest.approx([1 / 2] * 2 + [0.5 / 2] * 2)
    for row in batch.latents[2:]:  # within the deviations of one of their means
        assert min((row - moments[0, 0]).abs().max() for moments in images.class_images) < 1


@pytest.mark.parametrize("reg_batch", ["sum", "mean"])
def test_images_of_the_class_have_no_part_in_the_penalty(reg_batch, make, base, images):
    """It is that of the concept's rows alone, by a plain loop over their maps."""
    method = make(prior_preservation=True, reg_batch=reg_batch)
    with method.attach(base):
        step = a_step(method, base, images, stage=1)
    assert len(step.t) == 4
    squares = torch.zeros(2)
    for layer in step.maps:
        maps = step.maps[layer].detach()
        for row in range(2):
            of_word, of_noun = (
                maps[row, :, :, mask[row]].mean() for mask in (step.context.placeholder, step.context.class_noun)
            )
            squares[row] += 3.0 * (of_word - of_noun) ** 2 / len(step.maps)
    expected = squares.sum() if reg_batch == "sum" else squares.mean()
    penalty = method.attention_penalty(step, 3.0, 0.0)["attention_mean"]
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("reg_batch", ["sum", "mean"])
@pytest.mark.parametrize("reg_pool", ["layer", "all"])
def test_constrained_values_are_compared_one_by_one(reg_pool, reg_batch, base, bear, images):
    """By a plain loop over all heads and locations, of a class noun of two tokens; it ignores the other statistics."""
    method = AttnDreamBooth(short(constraint="values", reg_pool=reg_pool, reg_batch=reg_batch), base, bear)
    with method.attach(base):
        step = a_step(method, base, images, stage=1)
    rows = []
    for row in range(2):
        differences = []
        for layer in step.maps:
            maps = step.maps[layer].detach()[row]  # (heads, h*w, L)
            of_noun = maps[:, :, step.context.class_noun[row]]
            assert of_noun.shape[-1] == 2
            differences.append((maps[:, :, step.context.placeholder[row]][..., 0] - of_noun.mean(dim=-1)).flatten())
        means = [values.pow(2).mean() for values in differences]
        rows.append(torch.cat(differences).pow(2).mean() if reg_pool == "all" else sum(means) / len(means))
    expected = 3.0 * (sum(rows) if reg_batch == "sum" else sum(rows) / 2)
    penalty = method.attention_penalty(step, 3.0, 5.0)
    assert list(penalty) == ["attention_values"] and method.attention_penalty(step, 0.0, 5.0) == {}
    torch.testing.assert_close(penalty["attention_values"].detach(), torch.as_tensor(expected), rtol=1e-4, atol=0)


def test_no_gradient_is_clipped(make, base, images):
    method = make(embedding_mean_weight=1e9)
    assert {stage.max_gradient_norm for stage in method.stages()} == {math.inf}
    seen = []
    train(method, base, images, 0, lambda row: seen.append((row["gradient_norm"], method.embedding.vector.grad)))
    norm, gradient = seen[0]
    assert norm > 10
    torch.testing.assert_close(gradient.norm().item(), norm)


@pytest.mark.parametrize("without", ["embedding", "attention", "unet"])
def test_a_stage_of_no_steps_is_left_out_and_the_others_stay_as_they_are(without, make, base, images):
    method = make(**{f"{without}_steps": 0})
    whole = make()
    kept = [stage for stage in whole.stages() if stage.name != without]
    assert [(s.name, s.steps, s.batch_size, s.param_groups[0]["lr"]) for s in method.stages()] == [
        (s.name, s.steps, s.batch_size, s.param_groups[0]["lr"]) for s in kept
    ]
    assert {row["stage"] for row in train(method, base, images, seed=0)} == {stage.name for stage in kept}


def test_without_the_first_stage_the_embedding_keeps_its_initial_value(make, base, images):
    method = make(embedding_steps=0, **STEEP)
    train(method, base, images, seed=0)
    assert torch.equal(method.embedding.vector, base.word_embedding("dog"))
    assert "embedding.vector" in method.state_dict() and list(method.embedding.parameters()) == []


def test_without_the_second_stage_the_third_starts_from_the_base_unet_with_the_embedding_of_the_first(
    make, base, images, concept
):
    method = make(attention_steps=0, **STEEP)
    seen = []

    def log(row):
        if row["stage"] == "embedding":
            seen.append(method.embedding.vector.detach().clone())

    train(method, base, images, 0, log)
    assert torch.equal(method.embedding.vector, seen[-1])
    fresh = make(attention_steps=0)
    with torch.no_grad():
        fresh.embedding.vector.copy_(seen[-1])
        said = fresh.condition(base, ["a photo of a <v> dog"])(torch.tensor([0]))
    expected = predict(base, said)
    with fresh.attach(base):
        assert torch.equal(predict(base, said), expected)


def test_without_the_third_stage_only_the_cross_attention_is_kept(make, base):
    names = [name for name, _ in make(unet_steps=0).unet.items()]
    assert len(names) == len(LAYERS) * 5 and all(".attn2." in name for name in names)
    assert list(make(unet_steps=0, attention_steps=0).unet.items()) == []


def test_the_third_stage_goes_on_from_the_second(make, base, images):
    method = make(**STEEP, unet_mean_weight=0.0, unet_variance_weight=0.0)
    after = states_of_stages(method, base, images)
    resumed = make(**STEEP, unet_mean_weight=0.0, unet_variance_weight=0.0)
    resumed.load_state_dict(after["attention"])
    with resumed.attach(base):
        first = diffusion_loss(a_step(resumed, base, images, stage=2)).item()
    rows = [row for row in train(make(**STEEP), base, images, seed=0) if row["stage"] == "unet"]
    assert rows[0]["diffusion"] == pytest.approx(first, rel=1e-6)


def test_the_fast_recipe_can_be_chosen(base, concept):
    """docs/methods.md#attndreambooth: rate 1e-5, 200 steps, batch 4 in the third stage."""
    method = AttnDreamBooth(Config(unet_steps=200, unet_batch_size=4, unet_lr=1e-5), base, concept)
    assert [(s.steps, s.batch_size) for s in method.stages()] == [(60, 8), (100, 8), (200, 4)]
    assert method.stages()[-1].param_groups[0]["lr"] == 1e-5


# -- after each stage ------------------------------------------------------------------------------------------


def test_one_artifact_samples_as_it_was_after_each_stage(make, base, images):
    method = make(**STEEP)
    train(method, base, images, seed=0)
    prompts = ["a photo of a <v> dog on the beach"]
    stages: list[tuple[Any, tuple[str, ...]]] = [
        ("embedding", ("attention_steps", "unet_steps")),
        ("attention", ("unet_steps",)),
    ]
    for stage, missing in stages:
        method.sampling = Sampling(after_stage=stage)
        shorter = make(**STEEP, **dict.fromkeys(missing, 0))
        train(shorter, base, images, seed=0)
        assert torch.equal(sample_latents(method, base, prompts), sample_latents(shorter, base, prompts)), stage
    sampled = []
    for stage in get_args(get_type_hints(Sampling)["after_stage"]):
        method.sampling = Sampling(after_stage=stage)
        sampled.append(sample_latents(method, base, prompts))
    assert not torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[1], sampled[2])


def test_without_a_third_stage_the_second_is_the_last(make, base, images):
    method = make(**STEEP, unet_steps=0)
    train(method, base, images, seed=0)
    last = sample_latents(method, base, ["a photo of a <v> dog"])
    method.sampling = Sampling(after_stage="attention")
    assert torch.equal(sample_latents(method, base, ["a photo of a <v> dog"]), last)


def test_training_ignores_how_it_will_be_sampled(make, base, images):
    plain, other = make(**STEEP), make(**STEEP)
    other.sampling = Sampling(after_stage="embedding")
    train(plain, base, images, seed=0)
    train(other, base, images, seed=0)
    assert equal_bits(plain.state_dict(), other.state_dict())


def test_what_was_kept_of_the_second_stage_is_no_parameter(make, base):
    method = make()
    assert len(list(method.after_attention.buffers())) == len(LAYERS) * 5
    assert not any(name.startswith("after_attention") for name, _ in method.named_parameters())


# -- the regularizer -------------------------------------------------------------------------------------------


def naive_attention(step) -> list[np.ndarray]:
    """softmax(Q K^T / sqrt(d)) of all layers in float64, each (B, H, N, L)."""
    maps = []
    for layer in LAYERS:
        q, k = (tensor.detach().double().numpy() for tensor in step.maps._query_key[layer])
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        maps.append(powers / powers.sum(axis=-1, keepdims=True))
    return maps


def naive_penalty(maps, placeholder: int, noun: list[int], pool: str, batch: str) -> dict[str, float]:
    """Eq. 2 of the paper and the code's reading of it, one row, layer and token at a time; both lambdas 1."""
    rows = []
    for b in range(len(maps[0])):
        of_v = [p[b, :, :, placeholder].ravel() for p in maps]
        of_noun = [np.mean([p[b, :, :, position] for position in noun], axis=0).ravel() for p in maps]
        if pool == "all":
            of_v, of_noun = [np.concatenate(of_v)], [np.concatenate(of_noun)]
        pairs = list(zip(of_v, of_noun, strict=True))
        means = np.mean([(v.mean() - noun.mean()) ** 2 for v, noun in pairs])
        variances = np.mean([(v.var(ddof=1) - noun.var(ddof=1)) ** 2 for v, noun in pairs])
        rows.append((means, variances))
    mean, variance = np.sum(rows, axis=0) if batch == "sum" else np.mean(rows, axis=0)
    return {"attention_mean": mean, "attention_variance": variance}


@pytest.mark.parametrize("rule", ["last", "first", "mean"])
@pytest.mark.parametrize("batch", ["sum", "mean"])
@pytest.mark.parametrize("pool", ["layer", "all"])
def test_the_regularizer_is_eq_2_as_a_plain_loop_computes_it(pool, batch, rule, base, bear, images):
    """The class noun has two tokens: all count, their maps averaged, but the first alone with `first`."""
    config = short(embedding_batch_size=3, reg_pool=pool, reg_batch=batch, class_token_rule=rule)
    method = disturbed(AttnDreamBooth(config, base, bear))
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
        ours = method.attention_penalty(step, 2.0, 5.0)
    assert step.batch.prompts == ["a photo of a <b> teddy bear"] * 3
    noun = [6] if rule == "first" else [6, 7]  # begin, a, photo, of, a, <b>, teddy, bear
    expected = naive_penalty(naive_attention(step), 5, noun, pool, batch)
    np.testing.assert_allclose(ours["attention_mean"].item(), 2 * expected["attention_mean"], rtol=1e-3)
    np.testing.assert_allclose(ours["attention_variance"].item(), 5 * expected["attention_variance"], rtol=2e-3)


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_its_gradient_reaches_both_tokens_maps_as_finite_differences_have_it(pool, make, base, images):
    """Neither column is detached: the naive loss is differentiated by the keys of either word, and of both."""
    method = disturbed(make(reg_pool=pool))
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
    layers, maps = [LAYERS[0], LAYERS[1], LAYERS[-1]], AttentionMaps()
    for layer in LAYERS:  # cut off from each other, as the naive loss sees them
        query, key = step.maps._query_key[layer]
        maps.record(layer, query.clone().requires_grad_(), key.clone().requires_grad_())
    step = dataclasses.replace(step, maps=maps)
    keys = [maps._query_key[layer][1] for layer in layers]
    losses = method.attention_penalty(step, 1.0, 1.0)
    gradients = {name: torch.autograd.grad(loss, keys, retain_graph=True) for name, loss in losses.items()}
    arrays = {layer: tuple(t.detach().double() for t in maps._query_key[layer]) for layer in LAYERS}
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(layers):
        query, key = arrays[layer]
        for tokens in ([5], [6], [5, 6]):  # the placeholder's column, the class noun's, both
            direction = torch.zeros_like(key)
            direction[:, :, tokens] = torch.randn(key[:, :, tokens].shape, generator=generator, dtype=torch.float64)
            found = {}
            for sign in (1, -1):
                step.maps.record(layer, query, key + sign * 1e-4 * direction)
                for name, value in naive_penalty(naive_attention(step), 5, [6], pool, "sum").items():
                    found[name] = found.get(name, 0.0) + sign * value / 2e-4
            step.maps.record(layer, query, key)
            for name, numeric in found.items():
                ours = (gradients[name][number].double() * direction).sum().item()
                np.testing.assert_allclose(ours, numeric, rtol=1e-2, atol=1e-12)
                assert abs(numeric) > 1e-12


def test_in_the_first_stage_the_gradient_reaches_the_embedding_by_keys_and_by_later_layers_queries(make, base, images):
    method = disturbed(make())
    method.requires_grad_(False)
    vector = method.embedding.vector.requires_grad_()
    with method.attach(base):
        step = a_step(method, base, images)
        for number, layer in enumerate(LAYERS):
            query, key = step.maps._query_key[layer]
            (by_key,) = torch.autograd.grad(key.pow(2).sum(), vector, retain_graph=True)
            assert by_key.abs().sum() > 0
            assert query.requires_grad == (number > 0)  # the first layer's queries have seen no text yet
            if number:
                (by_query,) = torch.autograd.grad(query.pow(2).sum(), vector, retain_graph=True)
                assert by_query.abs().sum() > 0
        (gradient,) = torch.autograd.grad(method.attention_penalty(step, 0.1, 0.0)["attention_mean"], vector)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_in_the_later_stages_the_gradient_reaches_queries_and_keys_and_not_the_embedding(stage, make, base, images):
    method = disturbed(make())
    trained = method.stages()[stage].param_groups[0]["params"]
    method.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    with method.attach(base):
        step = a_step(method, base, images, stage)
        loss: Any = sum(method.stages()[stage].penalty(step).values())
        assert not step.context.hidden.requires_grad
        weights = dict(method.unet.items())
        for layer in LAYERS:
            for kind in ("to_q", "to_k"):
                weight = weights[f"{layer}.transformer_blocks.0.attn2.{kind}.weight"]
                (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
                assert gradient.abs().sum() > 0, (layer, kind)


def test_the_diffusion_loss_has_a_finite_gradient_on_the_embedding(make, base, images):
    method = make()
    with method.attach(base):
        (gradient,) = torch.autograd.grad(diffusion_loss(a_step(method, base, images)), method.embedding.vector)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_it_is_zero_when_both_words_are_the_same_column(pool, make, base, images):
    method = disturbed(make(reg_pool=pool))
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
        assert all(loss > 0 for loss in method.attention_penalty(step, 1.0, 1.0).values())
        same = dataclasses.replace(step.context, placeholder=step.context.class_noun)
        losses = method.attention_penalty(dataclasses.replace(step, context=same), 1.0, 1.0)
    assert {name: loss.item() for name, loss in losses.items()} == {"attention_mean": 0, "attention_variance": 0}


def test_the_mean_over_the_batch_is_its_share_of_the_sum(base, concept, images):
    losses = {}
    for batch in ("sum", "mean"):
        config = short(embedding_batch_size=4, reg_batch=batch)
        method = disturbed(AttnDreamBooth(config, base, concept))
        with method.attach(base), torch.no_grad():
            losses[batch] = method.attention_penalty(a_step(method, base, images), 1.0, 1.0)
    for name, total in losses["sum"].items():
        torch.testing.assert_close(losses["mean"][name], total / 4)


def test_a_weight_of_zero_leaves_its_term_out(make, base, images):
    method = make()
    with method.attach(base), torch.no_grad():
        named = [set(stage.penalty(a_step(method, base, images, n))) for n, stage in enumerate(method.stages())]
    both = {"attention_mean", "attention_variance"}
    assert named == [{"attention_mean"}, both, both]


def test_without_the_regularizer_no_map_is_read_and_the_noise_is_the_same(make, base, images):
    method = make(**UNREGULARIZED)
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
        with_it = a_step(make(), base, images)
        step.maps._query_key.clear()
        assert all(stage.penalty(step) == {} for stage in method.stages())
    assert torch.equal(step.x_t, with_it.x_t) and torch.equal(step.t, with_it.t)


def test_statistics_stay_in_float32_where_the_unet_runs_in_bfloat16(concept, images):
    base = tiny_base(dtype=torch.bfloat16)
    method = disturbed(AttnDreamBooth(short(), base, concept))
    with method.attach(base):
        step = a_step(method, base, images)
        assert step.maps._query_key[LAYERS[0]][0].dtype == torch.bfloat16
        losses = method.attention_penalty(step, 1.0, 1.0)
    expected = naive_penalty(naive_attention(step), 5, [6], "layer", "sum")
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        np.testing.assert_allclose(loss.item(), expected[name], rtol=2e-3)


# -- what it starts from, and what is refused ------------------------------------------------------------------


def test_it_starts_from_the_class_noun_by_the_token_that_is_chosen(base, bear):
    start = {
        rule: AttnDreamBooth(Config(class_token_rule=rule), base, bear).embedding.vector
        for rule in ("last", "first", "mean")
    }
    assert torch.equal(start["last"], base.word_embedding("bear"))
    assert torch.equal(start["first"], base.word_embedding("teddy"))
    torch.testing.assert_close(start["mean"], (base.word_embedding("bear") + base.word_embedding("teddy")) / 2)


def test_concept_images_are_turned_and_mirrored_unless_the_paper_is_followed():
    """How the concept images are prepared, as the code does it."""
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("rotate", "bilinear", True)
    plain = Config(rotate=False).preprocessing
    assert (plain.geometry, plain.interpolation, plain.flip) == ("crop", "bilinear", False)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"embedding_steps": 0, "attention_steps": 0, "unet_steps": 0}, "nothing would be learned"),
        ({**UNREGULARIZED, "reg_pool": "all"}, "shape the attention regularizer, which no stage has"),
        ({**UNREGULARIZED, "reg_batch": "mean"}, "shape the attention regularizer, which no stage has"),
        ({"constraint": "values", "unet_variance_weight": 1.0}, "does nothing with constraint: values"),
        (
            {"constraint": "values"} | {f"{stage}_mean_weight": 0.0 for stage in ("embedding", "attention", "unet")},
            "constraint = 'values' shape the attention regularizer, which no stage has",
        ),
        (
            {"attention_steps": 0, "unet_steps": 0, "embedding_mean_weight": 0, "reg_pool": "all"},
            "shape the attention regularizer, which no stage has",
        ),
    ],
)
def test_choices_that_contradict_each_other_are_refused_in_a_sentence(chosen, why):
    with pytest.raises((InputError, ValidationError), match=why):
        Config(**chosen)


# -- elsewhere -------------------------------------------------------------------------------------------------


def test_the_embedding_in_the_vocabulary_samples_the_same_image(make, base, concept):
    """The row of a token that stands in the placeholder's place, instead of the hook."""
    method = disturbed(make())
    expected = sample_latents(method, base, ["a photo of <v> dog on the beach"])
    with torch.no_grad():
        base.text_encoders.tables[0].weight[base.tokenizer.rare_id] = method.embedding.vector
    other = AttnDreamBooth(short(), base, Concept("other", "<other>", "mug"))
    other.unet = method.unet
    assert torch.equal(sample_latents(other, base, ["a photo of sks dog on the beach"]), expected)


@pytest.mark.parametrize("last", ["unet", "attention", "embedding"])
@pytest.mark.parametrize("linear", [False, True], ids=["convolutional", "linear"])
def test_the_export_samples_in_stock_diffusers_what_it_samples_here(linear, last, concept, tmp_path):
    base = tiny_base(linear)
    missing = {"unet": (), "attention": ("unet_steps",), "embedding": ("unet_steps", "attention_steps")}[last]
    method = disturbed(AttnDreamBooth(short(**dict.fromkeys(missing, 0)), base, concept)).eval()
    how = method.export(base, tmp_path)
    assert 'pipe.load_textual_inversion("learned_embeds.safetensors")' in how and "'<v> dog'" in how
    changed = {}
    if last != "embedding":
        assert 'UNet2DConditionModel.from_pretrained("unet")' in how
        unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        changed = {"unet": unet.eval()}
    assert (tmp_path / "unet").exists() == bool(changed)
    pipe = fresh_pipeline(base, **changed)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    check_same(pipe, "a photo of <v> dog on the beach", method, base)
