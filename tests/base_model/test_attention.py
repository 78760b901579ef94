"""The maps are the weights that the layers really gave their values, and watching changes nothing."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from personalize_core.base_model.attention import AttentionMaps, CrossAttention, SelfAttention, check_plain
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from tests.conftest import LAYERS, tiny_base, tiny_parts

PROMPTS = ["a photo of <v> dog", "a red mug on the beach"]


@pytest.fixture
def context(base, concept) -> TextContext:
    return base.encode(PROMPTS, concept)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def denoise(base: BaseModel, noise, context, maps: AttentionMaps | None = None):
    return base.denoise(noise, torch.full((len(noise),), 300), context, maps)


def attn2(base: BaseModel, layer: str) -> Any:
    return base.transformers[layer].transformer_blocks[0].attn2


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def naive_maps(base: BaseModel, noise, context) -> dict[str, np.ndarray]:
    """softmax(Q K^T / sqrt(d)) of each layer in float64, from what entered its to_q and to_k."""
    entered: dict[str, dict[str, torch.Tensor]] = {layer: {} for layer in LAYERS}

    def keeping(layer, name):
        return lambda module, args: entered[layer].update({name: args[0]})

    projections = [(layer, name) for layer in LAYERS for name in ("to_q", "to_k")]
    handles = [getattr(attn2(base, la), name).register_forward_pre_hook(keeping(la, name)) for la, name in projections]
    with hooked(*handles), torch.no_grad():
        denoise(base, noise, context)
    maps = {}
    for layer, inputs in entered.items():
        attention = attn2(base, layer)

        def heads(name, attention=attention, inputs=inputs):  # (B, rows, C) -> (B, H, rows, d)
            weight = getattr(attention, name).weight.double().numpy()
            projected = inputs[name].double().numpy() @ weight.T
            return projected.reshape(*projected.shape[:2], attention.heads, -1).transpose(0, 2, 1, 3)

        q, k = heads("to_q"), heads("to_k")
        maps[layer] = softmax(np.einsum("bhnd,bhjd->bhnj", q, k) / np.sqrt(q.shape[-1]))
    return maps


# -- the U-Net is the stock one --------------------------------------------------------------------------------


def test_the_unet_predicts_as_with_diffusers_own_processors(base, context, noise):
    linear = base.unet.config.use_linear_projection
    stock = tiny_parts(linear)["unet"].eval()
    stock.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad():
        expected = stock(noise, torch.full((2,), 300), context.hidden).sample
        torch.testing.assert_close(denoise(base, noise, context), expected, atol=1e-5, rtol=0)


def test_only_cross_attention_is_recorded(base):
    kinds: dict[str, type] = {name: type(processor) for name, processor in base.unet.attn_processors.items()}
    assert all((kind is CrossAttention) == ("attn2" in name) for name, kind in kinds.items())
    assert all((kind is SelfAttention) == ("attn1" in name) for name, kind in kinds.items())


def test_the_layers_are_named_in_the_order_they_run(base, context, noise):
    ran, maps = [], AttentionMaps()
    by_module = {attn2(base, layer): layer for layer in LAYERS}
    hooks = [module.register_forward_hook(lambda m, a, o: ran.append(by_module[m])) for module in by_module]
    with hooked(*hooks), torch.no_grad():
        denoise(base, noise, context, maps)
    assert ran == list(LAYERS) == list(maps)
    assert [attn2(base, layer).processor.index for layer in ran] == list(range(len(LAYERS)))


def test_every_cross_attention_layer_of_the_unet_is_among_them(base):
    named = {name.removesuffix(".transformer_blocks.0.attn2.processor") for name in base.unet.attn_processors}
    assert {name for name in named if "attn1" not in name} == set(LAYERS)


@dataclasses.dataclass(frozen=True)
class TextPerLayer(TextContext):
    """Another text for each layer, and values that differ from keys."""

    def layer(self, index: int):
        return self.hidden + index, self.hidden - 100 - index


def test_a_layer_takes_keys_and_values_from_the_text_of_its_own_index(base, context, noise):
    context = TextPerLayer(**vars(context))
    entered = {}

    def keeping(name, layer):
        return lambda module, args: entered.update({(name, layer): args[0]})

    with ExitStack() as stack, torch.no_grad():
        for layer in LAYERS:
            for name in ("to_k", "to_v"):
                hook = keeping(name, layer)
                stack.enter_context(hooked(getattr(attn2(base, layer), name).register_forward_pre_hook(hook)))
        denoise(base, noise, context)
    for index, layer in enumerate(LAYERS):
        assert torch.equal(entered["to_k", layer], context.hidden + index)
        assert torch.equal(entered["to_v", layer], context.hidden - 100 - index)


# -- the maps --------------------------------------------------------------------------------------------------


def test_the_maps_are_a_naive_softmax_over_all_tokens(base, context, noise):
    maps = AttentionMaps()
    with torch.no_grad():
        denoise(base, noise, context, maps)
    for layer, expected in naive_maps(base, noise, context).items():
        assert maps[layer].shape == expected.shape
        np.testing.assert_allclose(maps[layer].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(maps[layer].sum(dim=-1).numpy(), 1, atol=1e-5)


def test_the_maps_are_the_weights_that_the_layer_gave_its_values(base, context, noise):
    """Values that are one-hot in their token come out as the map itself."""
    layer, maps, attended = LAYERS[0], AttentionMaps(), []
    attention = attn2(base, layer)
    width = attention.to_v.weight.shape[0]
    shares = torch.zeros(2, 77, width)
    shares[:, 4] = 1.0  # so that what is attended to is the weight of token 4, in every channel

    with (
        hooked(
            attention.to_v.register_forward_hook(lambda module, args, output: shares),
            attention.to_out[0].register_forward_pre_hook(lambda module, args: attended.append(args[0])),
        ),
        torch.no_grad(),
    ):
        denoise(base, noise, context, maps)
    per_head = attended[0].unflatten(-1, (attention.heads, -1))[..., 0]  # (B, N, H)
    torch.testing.assert_close(per_head.transpose(1, 2), maps[layer][..., 4], atol=1e-6, rtol=0)


def test_a_look_at_words_is_the_mean_over_heads_and_the_sum_over_tokens(base, context, noise):
    maps = AttentionMaps()
    with torch.no_grad():
        denoise(base, noise, context, maps)
    mask = context.concept
    for layer, expected in naive_maps(base, noise, context).items():
        looked = np.stack([row[..., mask[b].numpy()].sum(axis=-1).mean(axis=0) for b, row in enumerate(expected)])
        np.testing.assert_allclose(maps.on(layer, mask).numpy(), looked, atol=1e-6)
    assert (maps.on(LAYERS[0], mask)[1] == 0).all()  # the second prompt does not speak of the concept


def test_maps_are_computed_in_float32_however_they_were_recorded():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, rows, 8, generator=generator, dtype=torch.bfloat16) for rows in (6, 5))
    maps = AttentionMaps()
    maps.record("layer", query, key)
    q, k = query.double().numpy(), key.double().numpy()
    assert maps["layer"].dtype == torch.float32
    np.testing.assert_allclose(maps["layer"].numpy(), softmax(q @ k.swapaxes(-1, -2) / np.sqrt(8)), atol=1e-6)


def test_maps_that_are_read_while_the_unet_predicts_are_those_of_afterwards():
    """As LAG and ViCo read them: within autocast, which would compute products in half precision."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, rows, 8, generator=generator) for rows in (6, 5))
    maps, tokens = AttentionMaps(), torch.tensor([[False, True, True, False, False]])
    maps.record("layer", query, key)

    def read() -> list[torch.Tensor]:
        columns = torch.eye(5)[None]
        statistics = maps.statistics(["layer"], columns, "layer")
        return [maps["layer"], maps.on("layer", tokens), maps.means(["layer"], "layer"), *statistics]

    afterwards = read()
    with torch.autocast("cpu", torch.bfloat16):
        meanwhile = read()
    for one, other in zip(meanwhile, afterwards, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


# -- their gradients -------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """Queries (B, H, N, d), keys (B, H, L, d), a mask (B, L) and weights (B, N) to make a loss of."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 3, 4, 5, generator=generator)
    key = torch.randn(2, 3, 6, 5, generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    return query.requires_grad_(), key.requires_grad_(), mask, torch.randn(2, 4, generator=generator)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_gradients_are_the_same_with_the_map_kept_and_with_it_computed_again(small):
    query, key, mask, weights = small
    maps = AttentionMaps()
    maps.record("layer", query, key)
    again = gradients((maps.on("layer", mask) * weights).sum(), query, key)
    kept = gradients(((maps["layer"].mean(dim=1) * mask[:, None]).sum(dim=-1) * weights).sum(), query, key)
    for one, other in zip(again, kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_gradients_are_those_of_finite_differences_in_float64(small):
    query, key, mask, weights = small
    maps = AttentionMaps()
    maps.record("layer", query, key)
    ours = gradients((maps.on("layer", mask) * weights).sum(), query, key)
    arrays = [query.detach().double().numpy().copy(), key.detach().double().numpy().copy()]
    shares, tokens = weights.double().numpy(), mask.double().numpy()

    def loss() -> float:
        q, k = arrays
        looked = softmax(np.einsum("bhnd,bhjd->bhnj", q, k) / np.sqrt(q.shape[-1])).mean(axis=1)
        return float((np.einsum("bnj,bj->bn", looked, tokens) * shares).sum())

    for array, gradient in zip(arrays, ours, strict=True):
        numeric = np.zeros_like(array)
        for place in np.ndindex(*array.shape):
            before = array[place]
            array[place] = before + 1e-5
            above = loss()
            array[place] = before - 1e-5
            numeric[place] = (above - loss()) / 2e-5
            array[place] = before
        np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-5)


def test_the_maps_carry_gradient_to_the_text_and_to_the_layers_before(base, context, noise):
    hidden = context.hidden.clone().requires_grad_()
    weight = base.unet.conv_in.weight.requires_grad_()
    maps = AttentionMaps()
    denoise(base, noise, dataclasses.replace(context, hidden=hidden), maps)
    looked = torch.stack([maps.on(layer, context.placeholder).sum() for layer in (LAYERS[0], LAYERS[-1])])
    for loss in looked:
        for gradient in torch.autograd.grad(loss, (hidden, weight), retain_graph=True):
            assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_maps_teach_the_same_while_the_unet_is_checkpointed_and_are_recorded_once(base, context, noise):
    """Queries and keys of the first pass are nodes of the graph that the second pass only fills in again."""
    found = []
    for recomputing in (nullcontext(), base.recomputing()):
        hidden, maps = context.hidden.clone().requires_grad_(), AttentionMaps()
        with recomputing:
            denoise(base, noise, dataclasses.replace(context, hidden=hidden), maps)
            recorded = {layer: maps._query_key[layer] for layer in maps}
            looked = torch.stack([maps.on(layer, context.placeholder).pow(2).sum() for layer in LAYERS]).sum()
            statistics = torch.cat(maps.statistics(LAYERS, context.placeholder[..., None].float(), "layer"))
            found.append(torch.autograd.grad(looked + statistics.sum(), hidden)[0])
        assert list(maps) == list(recorded) and all(maps._query_key[layer] is recorded[layer] for layer in maps)
    assert found[0].abs().sum() > 0 and torch.equal(*found)


def test_hooks_find_the_maps_of_their_layer_when_it_is_computed_again(base, context, noise):
    """Also where nobody asked for maps, so that only the latest layer's are kept."""
    looked: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    scale = torch.ones((), requires_grad=True)  # without it nothing behind the hook would be needed again

    def look(layer):
        def hook(module, args, output):
            with torch.no_grad():
                looked[layer].append(base.call.maps.on(layer, context.placeholder))
            return output * scale

        return attn2(base, layer).register_forward_hook(hook)

    with hooked(*(look(layer) for layer in LAYERS)), base.recomputing():
        denoise(base, noise, context).sum().backward()
    assert all(len(seen) == 2 and torch.equal(*seen) for seen in looked.values())


def test_training_works_while_the_unet_is_checkpointed(concept, noise):
    """The layers know their text and name from the call, not from the order of calls, so a second pass is the same."""
    answers = []
    for checkpointed in (False, True):
        base = tiny_base()
        if checkpointed:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()
        context = base.encode(PROMPTS, concept)
        hidden = context.hidden.clone().requires_grad_()
        answer = denoise(base, noise, dataclasses.replace(context, hidden=hidden))
        answers.append(gradients(answer.pow(2).sum(), hidden)[0])
    torch.testing.assert_close(answers[1], answers[0], atol=1e-4, rtol=1e-4)


# -- statistics of single tokens -------------------------------------------------------------------------------

SIZES = {"large": (2, 9), "small": (3, 4), "single": (1, 1)}  # heads and locations of three layers


@pytest.fixture
def recorded():
    """Maps of three layers of unequal size, and the queries and keys behind them; two rows, six tokens."""
    generator, maps = torch.Generator().manual_seed(4), AttentionMaps()
    leaves = {}
    for layer, (heads, locations) in SIZES.items():
        query = 2 * torch.randn(2, heads, locations, 5, generator=generator)
        key = torch.randn(2, heads, 6, 5, generator=generator)
        leaves[layer] = query.requires_grad_(), key.requires_grad_()
        maps.record(layer, *leaves[layer])
    columns = torch.rand(2, 6, 3, generator=generator)  # rows, tokens, columns
    return maps, leaves, columns


def naive_statistics(arrays, columns, pool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance, (G, B, J), over lists of values; the variance of one value is taken as 0."""
    values: list[list[list[np.ndarray]]] = []  # layer, row, column -> every value
    for q, k in arrays.values():
        p = softmax(np.einsum("bhnd,bhld->bhnl", q, k) / np.sqrt(q.shape[-1]))
        of_columns = np.einsum("bhnl,blj->bjhn", p, columns)
        values.append([[column.ravel() for column in row] for row in of_columns])
    if pool == "all":
        values = [[[np.concatenate(same) for same in zip(*rows, strict=True)] for rows in zip(*values, strict=True)]]
    means = np.array([[[v.mean() for v in row] for row in layer] for layer in values])
    variances = np.array([[[v.var(ddof=1) if len(v) > 1 else 0.0 for v in row] for row in layer] for layer in values])
    return means, variances


def in_float64(leaves) -> dict[str, list[np.ndarray]]:
    return {layer: [leaf.detach().double().numpy().copy() for leaf in pair] for layer, pair in leaves.items()}


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_statistics_are_those_of_all_values_over_heads_and_locations(pool, recorded):
    maps, leaves, columns = recorded
    expected = naive_statistics(in_float64(leaves), columns.double().numpy(), pool)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ours = maps.statistics(list(SIZES), columns, pool)
        for statistic, naive in zip(ours, expected, strict=True):
            assert statistic.dtype == torch.float32 and statistic.shape == naive.shape
            np.testing.assert_allclose(statistic.detach().numpy(), naive, atol=1e-6)


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_gradients_of_statistics_are_those_of_finite_differences_in_float64(pool, recorded):
    maps, leaves, columns = recorded
    weights = [torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    groups = 1 if pool == "all" else 3
    mean, variance = maps.statistics(list(SIZES), columns, pool)
    ours = (mean * weights[0][:groups]).sum() + 30 * (variance * weights[1][:groups]).sum()
    flat = [leaf for pair in leaves.values() for leaf in pair]
    gradients_of = iter(torch.autograd.grad(ours, flat, allow_unused=True))
    arrays, tokens = in_float64(leaves), columns.double().numpy()

    def loss() -> float:
        statistics = naive_statistics(arrays, tokens, pool)
        shares = [weight[:groups].double().numpy() for weight in weights]
        return float((statistics[0] * shares[0]).sum() + 30 * (statistics[1] * shares[1]).sum())

    for pair in arrays.values():
        for array in pair:
            gradient, numeric = next(gradients_of), np.zeros_like(array)
            for place in np.ndindex(*array.shape):
                before, above = array[place], 0.0
                array[place] = before + 1e-5
                above = loss()
                array[place] = before - 1e-5
                numeric[place] = (above - loss()) / 2e-5
                array[place] = before
            np.testing.assert_allclose(gradient.numpy(), numeric, atol=2e-5)


@pytest.mark.parametrize("pool", ["layer", "all"])
def test_means_are_those_of_all_values_over_heads_and_locations_with_their_gradient(pool, recorded):
    maps, leaves, _ = recorded
    tokens = np.tile(np.eye(6), (2, 1, 1))
    expected, _ = naive_statistics(in_float64(leaves), tokens, pool)
    with torch.no_grad():
        np.testing.assert_allclose(maps.means(list(SIZES), pool).numpy(), expected, atol=1e-6)
    means = maps.means(list(SIZES), pool)
    np.testing.assert_allclose(means.detach().numpy(), expected, atol=1e-6)
    weights = torch.randn(means.shape, generator=torch.Generator().manual_seed(0))
    flat = [leaf for pair in leaves.values() for leaf in pair]
    ours = torch.autograd.grad((means * weights).sum(), flat)
    kept = maps.statistics(list(SIZES), torch.eye(6)[None], pool)[0]  # its gradients are tested above
    for one, other in zip(ours, torch.autograd.grad((kept * weights).sum(), flat), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


def test_one_row_of_columns_serves_all_rows(recorded):
    maps, _, columns = recorded
    for one, other in zip(
        maps.statistics(list(SIZES), columns[:1], "layer"),
        maps.statistics(list(SIZES), columns[:1].expand(2, -1, -1), "layer"),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_statistics_of_half_precision_keep_differences_that_half_precision_would_lose():
    """Two columns that differ by less than bfloat16's step of 2^-8."""
    generator, maps = torch.Generator().manual_seed(0), AttentionMaps()
    query, key = (torch.randn(1, 2, rows, 8, generator=generator, dtype=torch.bfloat16) for rows in (64, 5))
    key[:, :, 1] = key[:, :, 0] * 1.01
    maps.record("layer", query, key)
    columns = torch.eye(5)[None, :, :2]
    expected = naive_statistics(
        {"layer": [query.double().numpy(), key.double().numpy()]}, columns.double().numpy(), "all"
    )
    for ours, naive in zip(maps.statistics(["layer"], columns, "all"), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), naive, rtol=1e-5)
        assert (ours[..., 0] != ours[..., 1]).all() and (ours.bfloat16().float() - ours).abs().max() > 1e-6


# -- what is refused -------------------------------------------------------------------------------------------


def test_a_layer_with_more_than_stable_diffusion_has_is_refused(base):
    attention = attn2(base, LAYERS[0])
    check_plain("some layer", attention)
    attention.norm_q = torch.nn.LayerNorm(8)
    attention.rescale_output_factor = 2.0
    with pytest.raises(ValueError, match="some layer has norm_q, rescale_output_factor, which"):
        check_plain("some layer", attention)
