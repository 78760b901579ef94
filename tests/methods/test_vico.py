"""ViCo lets the image attend to a reference concept image, where the reference looks at the placeholder."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import erf
from skimage.filters import threshold_otsu

from personalize_core.artifacts import saving
from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.files.typed_yaml import build
from personalize_core.methods.personalized_residuals.method import Config as ResidualsConfig
from personalize_core.methods.personalized_residuals.method import PersonalizedResiduals
from personalize_core.methods.shared.options import LAG
from personalize_core.methods.vico import method as vico
from personalize_core.methods.vico.method import (
    Config,
    ViCo,
    image_block,
    of_reference,
    otsu,
    transformers_with_images,
)
from personalize_core.methods.vico.recipe import Sampling
from personalize_core.sampling import sampler as sampler_module
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.training.fixed_inputs import losses_on_fixed_inputs
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import disturbed, layers_of_stable_diffusion, predict, sample_latents, tiny_base

WITH_IMAGES = ("up_blocks.1.attentions.1", "up_blocks.2.attentions.1")  # of the base model here
PROMPTS = ["a photo of a <v> on the beach", "a red <v>", "the desert"]


def make(base, concept, **chosen) -> Any:
    return ViCo(Config(steps=3, **chosen), base, concept)


@pytest.fixture(params=[False, True], ids=["convolutional", "linear"])
def base(request) -> Any:
    """With image blocks at two resolutions."""
    return tiny_base(request.param, levels=3)


@pytest.fixture
def method(base, concept) -> Any:
    """In sampling, with three references."""
    made = make(base, concept).eval()
    made.references = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    return made


def guided(method, base, prompts=PROMPTS) -> TextContext:
    with torch.no_grad():
        empty, said = (method.condition(base, rows)(torch.tensor([500])) for rows in ([""] * len(prompts), prompts))
    return TextContext.guidance(empty, said)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


# -- the mask --------------------------------------------------------------------------------------------------


def plain_otsu(row: np.ndarray) -> np.ndarray:
    """The authors' loop, for one row."""
    a = (row - row.min()) / (row.max() - row.min())
    best, threshold = 0.0, 0.0
    for tenth in range(10):
        low, high = a[a < tenth / 10], a[a >= tenth / 10]
        if len(low) and len(high):
            score = len(low) / len(a) * len(high) / len(a) * (low.mean() - high.mean()) ** 2
            if score > best:
                best, threshold = score, tenth / 10
    return a >= threshold


@pytest.mark.parametrize("power", [0.3, 1, 4])
def test_the_mask_is_the_authors_loop(power):
    a = torch.rand(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** power * 0.02
    assert np.array_equal(otsu(a).numpy(), np.stack([plain_otsu(row) for row in a.numpy()]))


def test_the_threshold_is_scikit_images_where_it_tries_the_same():
    """On ten evenly spaced values our thresholds part them wherever a histogram of ten bins does."""
    levels = torch.randint(10, (60, 49), generator=torch.Generator().manual_seed(0))
    levels[:, 0], levels[:, 1] = 0, 9
    masks = otsu(levels / 9.0)
    for row, mask in zip(levels.numpy(), masks.numpy(), strict=True):
        threshold = threshold_otsu(hist=(np.bincount(row, minlength=10), np.arange(10) / 9))
        assert np.array_equal(mask, row / 9 > threshold)


def test_a_constant_map_masks_nothing_and_makes_no_nan():
    mixed = torch.stack([torch.full((9,), 0.3), torch.zeros(9), torch.arange(9.0)])
    masks = otsu(mixed)
    assert masks[0].all() and masks[1].all()
    assert masks[2].tolist() == [False] * 4 + [True] * 5 or masks[2].tolist() == [False] * 5 + [True] * 4
    assert otsu(torch.ones(1, 1)).all()


def test_a_mask_is_never_empty_and_does_not_depend_on_scale_or_order():
    a = torch.rand(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    masks = otsu(a)
    assert masks.any(dim=1).all() and not masks.all(dim=1).any()
    assert torch.equal(otsu(a * 8 + 2), masks)
    assert torch.equal(otsu(a[:, order]), masks[:, order])


# -- the block -------------------------------------------------------------------------------------------------


def naive_block(p: dict[str, np.ndarray], x: np.ndarray, r: np.ndarray, mask: np.ndarray, heads: int) -> np.ndarray:
    """One row. x, r: (N, C). mask: (N,) bool."""

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(name: str, x: np.ndarray, seen: np.ndarray, mask: np.ndarray) -> np.ndarray:
        q, k, v = x @ p[f"{name}.to_q.weight"].T, seen @ p[f"{name}.to_k.weight"].T, seen @ p[f"{name}.to_v.weight"].T
        d, parts = x.shape[1] // heads, []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            logits = q[:, part] @ k[:, part].T / np.sqrt(d)
            parts.append(softmax(np.where(mask, logits, -np.inf)) @ v[:, part])
        return np.concatenate(parts, axis=1) @ p[f"{name}.to_out.0.weight"].T + p[f"{name}.to_out.0.bias"]

    seen = norm("norm1", x)
    x = x + attention("attn1", seen, seen, np.ones(len(x), dtype=bool))
    x = x + attention("attn2", norm("norm2", x), r, mask)
    inner = norm("norm3", x) @ p["ff.net.0.proj.weight"].T + p["ff.net.0.proj.bias"]
    value, gate = np.split(inner, 2, axis=1)
    gelu = gate * (1 + erf(gate / np.sqrt(2))) / 2
    return x + (value * gelu) @ p["ff.net.2.weight"].T + p["ff.net.2.bias"]


@pytest.fixture
def block_case(base) -> Any:
    """A block in float64, features of two rows, and a mask for each."""
    text_block: Any = base.transformers[WITH_IMAGES[0]].transformer_blocks[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = disturbed(image_block(text_block)).double()
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(2, 6, text_block.dim, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, False, True, True, False, False], [False, False, False, False, True, False]])
    return block, x, r, mask, text_block.attn2.heads


def test_the_block_is_self_attention_masked_image_attention_and_a_gated_layer(block_case):
    block, x, r, mask, heads = block_case
    p = {name: array(parameter) for name, parameter in block.named_parameters()}
    answer = block(x, encoder_hidden_states=r, encoder_attention_mask=mask[:, None])
    for row in range(2):
        expected = naive_block(p, array(x[row]), array(r[row]), mask[row].numpy(), heads)
        np.testing.assert_allclose(array(answer[row]), expected, atol=1e-10)


def test_its_gradients_are_the_finite_differences_of_the_formula(block_case):
    """In one random direction for each parameter and each input, which no single wrong entry survives."""
    block, x, r, mask, heads = block_case
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    inputs = {"x": x.requires_grad_(), "r": r.requires_grad_(), **dict(block.named_parameters())}
    loss = (block(x, encoder_hidden_states=r, encoder_attention_mask=mask[:, None]) * wanted).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))

    def formula(values: dict[str, np.ndarray]) -> float:
        rows = (naive_block(values, values["x"][b], values["r"][b], mask[b].numpy(), heads) for b in range(2))
        return float((np.stack(list(rows)) * array(wanted)).sum())

    at = {name: array(tensor) for name, tensor in inputs.items()}
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        direction, h = array(torch.randn(tensor.shape, dtype=torch.float64, generator=generator)), 1e-5
        ahead, behind = (formula(at | {name: at[name] + sign * h * direction}) for sign in (1, -1))
        slope = (array(gradient) * direction).sum()
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6, err_msg=name)


def test_masked_places_of_the_reference_are_not_seen_and_have_no_gradient(block_case):
    block, x, r, mask, _ = block_case
    r.requires_grad_()
    answer = block(x, encoder_hidden_states=r, encoder_attention_mask=mask[:, None])
    (gradient,) = torch.autograd.grad(answer.square().sum(), r)
    assert not gradient[~mask].any() and gradient[mask].abs().sum() > 0


@pytest.mark.parametrize("joining", ["concatenation", "addition"])
@pytest.mark.parametrize("masked", [True, False])
def test_in_the_place_of_attention_features_of_the_same_place_go_through_one_matrix(joining, masked, base, concept):
    """Place by place, in float64; masked places of the reference count as zeros."""
    block: Any = make(base, concept, joining=joining).blocks.of(WITH_IMAGES[0])
    weight, bias = array(block.projection.weight), array(block.projection.bias)
    width, generator = len(bias), torch.Generator().manual_seed(5)
    x, r = torch.randn(2, 2, 6, width, generator=generator)
    mask = torch.tensor([[[True, False, True, True, False, False]], [[False] * 6]]) if masked else None
    answer = array(block(x, encoder_hidden_states=r, encoder_attention_mask=mask))
    for row in range(2):
        for place in range(6):
            seen = array(r[row, place]) * (mask is None or bool(mask[row, 0, place]))
            both = np.concatenate([array(x[row, place]), seen]) if joining == "concatenation" else seen
            np.testing.assert_allclose(answer[row, place], array(x[row, place]) + weight @ both + bias, atol=1e-5)


def test_blocks_start_from_the_frameworks_defaults(method):
    """No closed gate, and nothing of the pretrained blocks."""
    for block in method.blocks.values():
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                bound = 1 / math.sqrt(module.in_features)  # of PyTorch's uniform draw
                assert 0.8 * bound < module.weight.abs().max() <= bound, name
            elif isinstance(module, torch.nn.LayerNorm):
                assert (module.weight == 1).all() and not module.bias.any()


def test_blocks_sit_in_every_second_transformer_of_the_decoder(method, base):
    assert transformers_with_images(layers_of_stable_diffusion()) == (
        "up_blocks.1.attentions.1",
        "up_blocks.2.attentions.0",
        "up_blocks.2.attentions.2",
        "up_blocks.3.attentions.1",
    )
    assert [key.replace("/", ".") for key in method.blocks] == list(WITH_IMAGES)
    for layer in WITH_IMAGES:
        block, text_block = method.blocks[layer.replace(".", "/")], base.transformers[layer].transformer_blocks[0]
        assert block.attn2.heads == block.attn1.heads == text_block.attn2.heads
        assert block.attn2.to_k.weight.shape == text_block.attn1.to_k.weight.shape


# -- the reference's way through the U-Net ---------------------------------------------------------------------


def test_the_clean_reference_follows_the_noisy_rows_with_their_timesteps_and_texts(method, base, concept):
    method.sampling = Sampling(reference=2)
    context, seen = guided(method, base), {}
    layer: Any = base.transformers[base.layers[0]].transformer_blocks[0].attn2
    with (
        method.attach(base),
        hooked(
            base.unet.conv_in.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
            base.unet.time_proj.register_forward_pre_hook(lambda m, args: seen.update(t=args[0])),
            layer.to_k.register_forward_pre_hook(lambda m, args: seen.update(text=args[0])),
        ),
    ):
        answer = predict(base, context)
    rows = len(context)
    assert len(answer) == rows and len(seen["x"]) == 2 * rows
    assert torch.equal(seen["x"][rows:], method.references[2:3].expand(rows, -1, -1, -1))
    assert not torch.equal(seen["x"][:rows], seen["x"][rows:])
    assert seen["t"].tolist() == [500] * 2 * rows
    assert torch.equal(seen["text"], torch.cat([context.hidden, context.hidden]))


def streams(method, base, context) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last layer of the U-Net for the noisy rows and for the reference rows."""
    seen = {}
    handle = base.unet.conv_out.register_forward_hook(lambda m, args, output: seen.update(all=output.clone()))
    with hooked(handle), method.attach(base):
        predict(base, context)
    return seen["all"].chunk(2)


def test_the_reference_stream_does_not_depend_on_the_blocks(method, base):
    context = guided(method, base)
    x, r = streams(method, base, context)
    disturbed(method.blocks)
    other_x, other_r = streams(method, base, context)
    assert torch.equal(other_r, r)
    assert not torch.equal(other_x, x)


def test_the_reference_stream_is_the_base_models_prediction_for_the_reference(method, base):
    context = guided(method, base)
    _, r = streams(method, base, context)
    with torch.no_grad():
        plain = base.denoise(method.references[:1].expand(len(context), -1, -1, -1), torch.full((6,), 500), context)
    torch.testing.assert_close(r, plain, atol=1e-5, rtol=0)


SAMPLINGS = [Sampling(), Sampling(uncond_mask="from_cond"), Sampling(lag=True), Sampling(reference=1)]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_while_sampling_the_reference_goes_through_the_unet_once_for_each_prompt(options, method, base, monkeypatch):
    """Against a reference row for every row, as in training."""
    method = disturbed(method).eval()
    method.sampling = options
    prompts = ["a photo of a <v>", "the dog", "a <v> on the beach", "a photo of a <v>", "a <v> on the beach"]
    rows: list[int] = []
    base.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    noise = initial_noise(base, 0, [(index, 0) for index in range(len(prompts))])
    how = (noise, make_sampler("ddim", base), 2, 4.0)
    sampled = sample(method, base, prompts, *how)
    assert rows == [10 + 4] * 2  # of each half five; three prompts, and none
    rows.clear()
    monkeypatch.setattr(sampler_module, "distinct_rows", lambda prompts, device: None)
    naive = sample(method, base, prompts, *how)
    assert rows == [20] * 2
    assert (sampled - naive).abs().max() <= 1e-5 * naive.abs().max()


def test_with_its_blocks_bypassed_it_is_the_base_model(method, base):
    context = guided(method, base)
    expected = predict(base, context)
    with method.attach(base):
        assert (predict(base, context) - expected).abs().max() > 1e-2  # at step 0, by its design
    for block in method.blocks.values():
        for output in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            torch.nn.init.zeros_(output.weight)
            torch.nn.init.zeros_(output.bias)
    with method.attach(base):
        torch.testing.assert_close(predict(base, context), expected, atol=1e-5, rtol=0)


def test_without_image_attention_only_the_embedding_is_left(base, concept, images):
    method = make(base, concept, image_attention=False).eval()
    assert [name for name, _ in method.named_parameters()] == ["embedding.vector"]
    context = guided(method, base)
    expected = predict(base, context)
    with method.attach(base):
        assert torch.equal(predict(base, context), expected)
    (stage,) = method.train().stages()
    with method.attach(base):  # in training, the reference rows are there for the regularizer
        step = denoising_step(method, base, images, stage, seed=0, index=0)
    with torch.no_grad():
        plain = base.denoise(step.x_t, step.t, step.context)
    torch.testing.assert_close(step.prediction, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_whoever_asks_for_maps_gets_those_of_the_noisy_rows(training, method, base, images):
    """Blocks come after the maps of their layer, so the first of them changes no map before its own."""
    method.train(training)
    method.batch(images, 4, torch.Generator().manual_seed(0))
    context = method.condition(base, ["a <v>", "a red <v>", "a <v> dog", "the <v>"])(torch.tensor([0]))
    noise, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.full((4,), 500)
    maps, plain = AttentionMaps(), AttentionMaps()
    with torch.no_grad():
        base.denoise(noise, t, context, plain)
        with method.attach(base):
            base.denoise(noise, t, context, maps)
    extra = [of_reference(layer) for layer in WITH_IMAGES] if training else []
    assert sorted(maps) == sorted([*base.layers, *extra])
    for layer in base.layers[: base.layers.index(WITH_IMAGES[0]) + 1]:
        torch.testing.assert_close(maps[layer], plain[layer], atol=1e-5, rtol=0)
    assert {len(maps[layer]) for layer in maps} == {4}


def as_linear(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A U-Net's weights with its 1x1 projections as matrices."""
    return {
        name: t.flatten(1) if name.endswith(("proj_in.weight", "proj_out.weight")) else t for name, t in state.items()
    }


def test_both_kinds_of_projection_agree_on_the_same_numbers(concept):
    convolutional, linear = tiny_base(False, levels=3), tiny_base(True, levels=3)
    linear.unet.load_state_dict(as_linear(convolutional.unet.state_dict()))
    method = make(convolutional, concept).eval()
    method.references = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(
        sample_latents(method, linear, PROMPTS), sample_latents(method, convolutional, PROMPTS), atol=1e-4, rtol=1e-4
    )


def test_residuals_kept_to_a_region_work_beside_it_in_either_order(method, base, concept):
    other: Any = disturbed(PersonalizedResiduals(ResidualsConfig(), base, concept)).eval()
    other.sampling = LAG(lag=True)
    context = guided(method, base, ["a photo of a <v> dog"])
    with method.attach(base), other.attach(base):
        first = predict(base, context)
    with other.attach(base), method.attach(base):
        torch.testing.assert_close(predict(base, context), first, atol=1e-5, rtol=0)
    with method.attach(base):
        assert not torch.equal(predict(base, context), first)


def test_residuals_kept_to_a_region_find_the_references_own_region_in_guidances_empty_half(method, base, concept):
    """The partner of a reference row is a reference row."""
    other: Any = disturbed(PersonalizedResiduals(ResidualsConfig(), base, concept)).eval()
    other.sampling = LAG(lag=True)
    context = guided(method, base, ["a photo of a <v> dog", "a red <v> dog"])
    with other.attach(base):
        _, r = streams(method, base, context)
        with torch.no_grad():
            reference = method.references[:1].expand(len(context), -1, -1, -1)
            plain = base.denoise(reference, torch.full((len(context),), 500), context)
    torch.testing.assert_close(r, plain, atol=1e-5, rtol=0)


def naive_region(features, layer: str, heads: int, words: np.ndarray, row: int) -> np.ndarray:
    """(h*w,) bool: where a noisy row looks at the words more than the median of its locations does."""
    q, k = (array(features[layer, name][row]) for name in "qk")
    d, looked = q.shape[1] // heads, np.zeros(len(q))
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        looked += softmax(q[:, part] @ k[:, part].T / np.sqrt(d))[:, words].sum(axis=1) / heads
    return looked > np.sort(looked)[(len(looked) - 1) // 2]


def test_under_lag_a_block_acts_where_the_image_looks_at_the_placeholder_and_nowhere_else(method, base):
    """Eq. 3 of Personalized Residuals, with f' the block's answer and f what it was given."""
    method.sampling = Sampling(lag=True)
    context = guided(method, base)
    given: dict[str, tuple] = {}
    left: dict[str, torch.Tensor] = {}
    handles = []
    for layer in WITH_IMAGES:

        def enter(block, args, output, layer=layer) -> None:
            given[layer] = args[0], output

        def leave(projection, args, layer=layer) -> None:  # what comes behind the block; the reference's rows second
            left[layer] = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]

        handles.append(method.blocks[layer.replace(".", "/")].register_forward_hook(enter))
        handles.append(base.transformers[layer].proj_out.register_forward_pre_hook(leave))
    with hooked(*handles):
        _, features = masks_of(method, base, context)
    for layer in WITH_IMAGES:
        heads = base.transformers[layer].transformer_blocks[0].attn2.heads
        f, changed = given[layer]
        for row, partner in enumerate([3, 4, 5, 3, 4, 5]):
            words, inside = context.concept[partner].numpy(), np.zeros(f.shape[1], dtype=bool)
            if words.any():
                inside = naive_region(features, layer, heads, words, partner)
            assert inside.any() == words.any()
            expected = np.where(inside[:, None], array(changed[row]), array(f[row]))
            assert np.array_equal(array(left[layer][row]), expected), (layer, row)
    assert not context.concept[5].any()  # the prompt without the placeholder has no region


# -- where the blocks look -------------------------------------------------------------------------------------


def masks_of(method, base, context, seed: int = 3) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
    """What each block is given as its mask, (B, 1, h*w); and the queries "q" and keys "k" of those layers."""
    given, features = {}, {}
    handles = []
    for layer in WITH_IMAGES:
        block, attention = method.blocks[layer.replace(".", "/")], base.transformers[layer].transformer_blocks[0].attn2

        def keep(m, args, kwargs, layer=layer) -> None:
            given[layer] = kwargs["encoder_attention_mask"]

        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        for name, projection in (("q", attention.to_q), ("k", attention.to_k)):

            def store(m, args, output, key=(layer, name)) -> None:
                features[key] = output

            handles.append(projection.register_forward_hook(store))
    noise = torch.randn(len(context), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with hooked(*handles), method.attach(base), torch.no_grad():
        base.denoise(noise, torch.full((len(context),), 500), context)
    return given, features


def naive_masks(features, layer: str, heads: int, columns: list[int]) -> np.ndarray:
    """(B, h*w), row by row and head by head."""
    rows, masks = len(columns), []
    for row, column in enumerate(columns):
        q, k = (array(features[layer, name][rows + row]) for name in "qk")  # the reference's rows come second
        d, looked = q.shape[1] // heads, np.zeros(len(q))
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            looked += softmax(q[:, part] @ k[:, part].T / np.sqrt(d))[:, column] / heads
        masks.append(plain_otsu(looked))
    return np.stack(masks)


@pytest.mark.parametrize("unconditional", ["own", "from_cond"])
def test_each_layers_mask_is_the_naive_one_also_in_guidances_halves(unconditional, method, base):
    """The empty half looks at the placeholder's position in the prompt, where it has padding itself."""
    method.sampling = Sampling(uncond_mask=unconditional)
    context = guided(method, base)
    places = [5, 3, 3]  # begin, then the words; the third prompt has no placeholder: its end-of-text token
    assert [PROMPTS[row].split().index("<v>") + 1 for row in (0, 1)] == places[:2]
    assert context.end[5].nonzero().item() == 3
    given, features = masks_of(method, base, context)
    for layer, side in zip(WITH_IMAGES, (4, 8), strict=True):
        heads = base.transformers[layer].transformer_blocks[0].attn2.heads
        expected = naive_masks(features, layer, heads, places * 2)
        if unconditional == "from_cond":
            expected[:3] = expected[3:]
        assert given[layer].shape == (6, 1, side * side)
        assert np.array_equal(given[layer][:, 0].numpy(), expected), layer
    halves_differ = any(not torch.equal(mask[:3], mask[3:]) for mask in given.values())
    assert halves_differ == (unconditional == "own")


def test_the_object_masks_are_those_that_its_blocks_are_given_of_each_reference(method, base):
    before = method.sampling
    references, masks = method.object_masks(base, PROMPTS[0], 500)
    assert torch.equal(references, method.references) and list(masks) == list(WITH_IMAGES) and method.sampling is before
    for number in range(3):
        method.sampling = Sampling(reference=number)
        context = method.condition(base, PROMPTS[:1])(torch.tensor([500]))
        given, _ = masks_of(method, base, context, seed=number)
        for layer in WITH_IMAGES:
            assert torch.equal(masks[layer][number], given[layer][0, 0])
    assert not torch.equal(masks[WITH_IMAGES[0]][0], masks[WITH_IMAGES[0]][1])


def test_the_object_masks_do_not_depend_on_the_image_size_that_is_sampled_at(method, base):
    _, masks = method.object_masks(base, PROMPTS[0], 500)
    larger = tiny_base(base.unet.config.use_linear_projection, levels=3, image_size=24)
    _, at_another = method.object_masks(larger, PROMPTS[0], 500)
    assert all(torch.equal(at_another[layer], masks[layer]) for layer in WITH_IMAGES)


@pytest.mark.parametrize("without", [{"mask": False}, {"image_attention": False}], ids=str)
def test_without_masks_there_are_none_to_look_at(without, base, concept):
    assert make(base, concept, **without).eval().object_masks(base, PROMPTS[0], 500)[1] == {}


def test_the_mask_follows_the_reference_and_not_the_noise(method, base):
    context = guided(method, base)
    (one, _), (other_noise, _) = masks_of(method, base, context, seed=3), masks_of(method, base, context, seed=4)
    method.sampling = Sampling(reference=1)
    other_reference, _ = masks_of(method, base, context, seed=3)
    assert all(torch.equal(one[layer], other_noise[layer]) for layer in WITH_IMAGES)
    assert not all(torch.equal(one[layer], other_reference[layer]) for layer in WITH_IMAGES)


def test_without_the_mask_all_of_the_reference_is_seen(base, concept):
    method = make(base, concept, mask=False).eval()
    given, _ = masks_of(method, base, guided(method, base))
    assert set(given.values()) == {None}


def test_no_gradient_goes_through_the_mask(method, base, monkeypatch):
    """Otsu's input is cut off: it is computed where nothing asks for gradients."""
    asked = []
    monkeypatch.setattr(vico, "otsu", lambda a: asked.append((a.requires_grad, torch.is_grad_enabled())) or otsu(a))
    with method.requires_grad_(True).attach(base):
        context = method.condition(base, ["a <v>"])(torch.tensor([500]))
        base.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([500]), context)
    assert asked == [(False, False)] * len(WITH_IMAGES)


# -- the regularizer -------------------------------------------------------------------------------------------


def a_step(method, base, images, stage=None):
    (stage,) = method.train().stages() if stage is None else [stage]
    with method.attach(base):
        return denoising_step(method, base, images, stage, seed=0, index=0)


def test_the_regularizer_is_the_formula_of_the_references_maps(base, concept, images):
    method = disturbed(make(base, concept, regularizer=0.25))
    step = a_step(method, base, images)
    expected = 0.0
    for layer in WITH_IMAGES:
        looked = step.maps[of_reference(layer)].detach().double().numpy().mean(axis=1)  # (B, h*w, L)
        distances = []
        for row in range(4):
            A_V = looked[row][:, step.context.placeholder[row].numpy()][:, 0]
            A_E = looked[row][:, step.context.end[row].numpy()][:, 0]
            distances += list((A_V / A_V.max() - A_E / A_E.max()) ** 2)
        expected += np.mean(distances)
    (value,) = method.stages()[0].penalty(step).values()
    np.testing.assert_allclose(value.item(), 0.25 * expected, rtol=1e-4)
    assert expected > 1e-3


def test_its_gradient_leaves_the_end_of_text_map_where_it_is(base, concept, images):
    """Against finite differences of a formula in which the end-of-text map is a constant."""
    method = make(base, concept, regularizer=1.0)
    step = a_step(method, base, images)
    names = [of_reference(layer) for layer in WITH_IMAGES]
    generator = torch.Generator().manual_seed(5)
    keys = {name: torch.randn(4, 2, 77, 8, generator=generator) for name in names}
    queries = {name: torch.randn(4, 2, 9, 8, generator=generator) for name in names}
    step.maps._query_key.clear()
    for name in names:
        step.maps.record(name, queries[name], keys[name].requires_grad_())
    (value,) = method.stages()[0].penalty(step).values()
    gradients = torch.autograd.grad(value, list(keys.values()))

    def looked(name: str, key: np.ndarray, tokens: torch.Tensor) -> np.ndarray:
        p = softmax(np.einsum("bhnd,bhld->bhnl", array(queries[name]), key) / np.sqrt(8)).mean(axis=1)
        return np.stack([p[row][:, tokens[row].numpy()][:, 0] for row in range(4)])

    for name, gradient in zip(names, gradients, strict=True):
        at = array(keys[name])
        A_E = looked(name, at, step.context.end)  # held fixed

        def formula(key: np.ndarray, name: str = name, A_E: np.ndarray = A_E) -> float:
            A_V = looked(name, key, step.context.placeholder)
            return float(((A_V / A_V.max(axis=1)[:, None] - A_E / A_E.max(axis=1)[:, None]) ** 2).mean())

        direction, h = array(torch.randn(at.shape, generator=generator)), 1e-6
        slope = (formula(at + h * direction) - formula(at - h * direction)) / (2 * h)
        np.testing.assert_allclose((array(gradient) * direction).sum(), slope, rtol=1e-3, atol=1e-7)


def test_it_moves_the_embedding_and_no_block(base, concept, images):
    method = disturbed(make(base, concept)).train()
    for parameter in method.parameters():
        parameter.requires_grad_(True)
    step = a_step(method, base, images)
    (value,) = method.stages()[0].penalty(step).values()
    parameters = [method.embedding.vector, *method.blocks.parameters()]
    embedding, *blocks = torch.autograd.grad(value, parameters, allow_unused=True)
    assert embedding is not None and embedding.isfinite().all() and embedding.abs().sum() > 0
    assert all(gradient is None or not gradient.any() for gradient in blocks)


def test_it_is_zero_where_the_placeholder_looks_where_the_end_looks(base, concept, images):
    step = a_step(make(base, concept), base, images)
    step.context.placeholder[:] = step.context.end
    (value,) = make(base, concept).stages()[0].penalty(step).values()
    assert value.item() == 0


def test_with_a_weight_of_zero_there_is_none(base, concept, images):
    method = make(base, concept, regularizer=0.0)
    step = a_step(method, base, images)
    assert method.stages()[0].penalty(step) == {} and sorted(step.maps) == sorted(base.layers)


def test_curves_with_and_without_it_are_of_the_same_inputs_and_leave_the_penalty_out(base, concept, images):
    """So what parts the two curves is what the penalty did to what was learned."""

    def trained(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The losses on fixed inputs before and after training, and the first line of the log."""
        torch.manual_seed(0)
        method = make(base, concept, **changes).train()

        def losses() -> torch.Tensor:
            with method.train().attach(base):
                return losses_on_fixed_inputs(method, base, images, method.stages()[0], seed=0)

        before, log = losses(), train(method, base, images, seed=0)
        return before, losses(), log[0]

    before, after, first = trained(regularizer=1e3)
    before_without, after_without, first_without = trained(**Config.ablations["without_regularizer"].changes)
    torch.testing.assert_close(before, before_without, rtol=1e-6, atol=0)
    assert not torch.allclose(after, after_without, rtol=1e-5, atol=0)
    assert first["diffusion"] == pytest.approx(first_without["diffusion"], rel=1e-6)
    assert first["regularizer"] > first["diffusion"] and "regularizer" not in first_without


# -- references ------------------------------------------------------------------------------------------------


def test_in_training_the_reference_is_another_concept_image(base, concept):
    """Concept image n has all its latents equal to n, without deviation."""
    concept_images = [torch.stack([torch.full((1, 4, 8, 8), float(n)), torch.zeros(1, 4, 8, 8)], 1) for n in range(4)]
    method, pairs = make(base, concept), []
    for seed in range(40):
        batch = method.batch(ConceptLatents(concept_images), 4, torch.Generator().manual_seed(seed))
        shown, reference = batch.latents[:, 0, 0, 0].tolist(), method._sampled[:, 0, 0, 0].tolist()
        assert sorted(shown) == [0, 1, 2, 3]
        pairs += list(zip(shown, reference, strict=True))
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 12 and all(one != other for one, other in counts)
    assert max(counts.values()) < 13.3 + 5 * 3  # binomial: 40 / 3, deviation 3


def test_a_single_concept_image_is_its_own_reference(base, concept, images):
    alone = ConceptLatents(images.concept[:1])
    method = make(base, concept, batch_size=2)
    train(method, base, alone, seed=0)
    assert torch.equal(method.references, images.concept[0][:, 0])
    batch = method.batch(alone, 2, torch.Generator().manual_seed(0))
    assert (batch.latents - images.concept[0][0, 0]).abs().max() < 0.6  # six deviations
    assert (method._sampled - images.concept[0][0, 0]).abs().max() < 0.6
    assert sample_latents(method, base, ["a <v>"]).isfinite().all()


def test_the_concepts_rows_are_those_of_any_method_with_templates(base, concept, images):
    rows = make(base, concept).batch(images, 4, torch.Generator().manual_seed(3)).latents
    generator = torch.Generator().manual_seed(3)
    torch.randint(81, (4,), generator=generator)
    assert torch.equal(rows, images.instances(4, generator))


def test_the_artifact_holds_every_concept_images_latents_to_choose_from(base, concept, images, tmp_path):
    method = make(base, concept)
    train(method, base, images, seed=0)
    assert torch.equal(method.references, torch.stack([views[0, 0] for views in images.concept]))
    saving.save(tmp_path, "vico", method, base, seed=0)
    restored: Any = saving.restore(tmp_path, base)
    sampled = []
    for reference in range(3):
        method.sampling = restored.sampling = Sampling(reference=reference)
        sampled.append(sample_latents(restored, base, ["a photo of a <v>"]))
        assert torch.equal(sample_latents(method, base, ["a photo of a <v>"]), sampled[-1])
    assert not torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[1], sampled[2])


def test_a_concept_image_that_is_not_there_is_refused(method, base):
    method.sampling = Sampling(reference=3)
    with pytest.raises(InputError, match="^there is no concept image 3 of 'v'; it was trained on 3, counted from 0$"):
        sample_latents(method, base, ["a <v>"])


def test_training_without_a_sampled_reference_is_an_error(base, concept):
    method = make(base, concept).train()
    with method.attach(base), pytest.raises(RuntimeError, match="`batch` has to draw references for these 1 rows"):
        predict(base, base.encode(["a photo"], concept))


# -- training --------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(base, concept, images):
    method = make(base, concept, regularizer=0.0)
    gradients = []
    for switch in (base.unet.disable_gradient_checkpointing, base.unet.enable_gradient_checkpointing):
        switch()
        with method.train().attach(base):
            loss = diffusion_loss(denoising_step(method, base, images, method.stages()[0], seed=0, index=0))
            gradients.append(torch.autograd.grad(loss, list(method.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_the_diffusion_loss_reaches_the_embedding_through_the_reference_too(base, concept, images):
    """The reference's features are not cut off: with the noisy rows' text held fixed a gradient is left."""
    method = make(base, concept)
    original = TextContext.and_again

    def half_detached(self: TextContext) -> TextContext:
        doubled, rows = original(self), len(self)
        hidden = torch.cat([doubled.hidden[:rows].detach(), doubled.hidden[rows:]])
        object.__setattr__(doubled, "hidden", hidden)
        return doubled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextContext, "and_again", half_detached)
        loss = diffusion_loss(a_step(method, base, images))
    (gradient,) = torch.autograd.grad(loss, method.embedding.vector)
    assert gradient.abs().sum() > 0


def test_the_recipe_is_the_authors_codes(base, concept):
    """docs/methods.md#vico: two rates, no clipping."""
    method = ViCo(Config(), base, concept)
    (stage,) = method.stages()
    assert (stage.steps, stage.batch_size, stage.max_gradient_norm) == (400, 4, math.inf)
    assert [group["lr"] for group in stage.param_groups] == [2e-2, 1e-5]
    assert stage.param_groups[0]["params"] == [method.embedding.vector]
    assert Config().regularizer == 5e-4
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("squash", "bicubic", False)


def test_prompts_are_sampled_from_the_81_templates_with_the_placeholder_alone(method, images):
    assert len(method.templates) == 81 and len(set(method.templates)) == 57
    prompts = method.batch(images, 900, torch.Generator().manual_seed(0)).prompts
    assert set(prompts) == {template.replace("{}", "<v>") for template in method.templates}


def test_it_starts_from_the_class_noun(method, base):
    assert torch.equal(method.embedding.vector, base.word_embedding("dog"))


@pytest.mark.parametrize(("rule", "word"), [("last", "bear"), ("first", "teddy")])
def test_where_it_has_several_tokens_it_starts_from_the_one_that_is_chosen(rule, word, base):
    method = ViCo(Config(class_token_rule=rule), base, Concept("b", "<b>", "teddy bear"))
    assert torch.equal(method.embedding.vector, base.word_embedding(word))


# -- bad input -------------------------------------------------------------------------------------------------


def test_several_placeholders_in_a_prompt_are_refused(method, base):
    with pytest.raises(InputError, match="ViCo reads one placeholder in a prompt, but 'a <v> on a <v>' has several"):
        method.condition(base, ["a <v>", "a <v> on a <v>"])


def test_switches_that_contradict_each_other_are_refused():
    said = "mask: false leaves the mask out of image attention, which image_attention: false has not"
    with pytest.raises(ValidationError, match=said):
        Config(mask=False, image_attention=False)
    with pytest.raises(InputError, match=f"^params.yaml, methods.vico.mini: {said}$"):
        build(Config, {"mask": False, "image_attention": False}, "params.yaml, methods.vico.mini")


def test_sampling_options_that_the_artifact_has_no_use_for_are_refused():
    without, unmasked = Config(image_attention=False), Config(mask=False)
    for sampling in (Sampling(reference=1), Sampling(uncond_mask="from_cond")):
        with pytest.raises(InputError, match="without image attention there is no reference"):
            without.check(sampling)
    with pytest.raises(InputError, match="uncond_mask: from_cond chooses a mask, but it was trained with mask: false"):
        unmasked.check(Sampling(uncond_mask="from_cond"))
    for config, sampling in ((without, Sampling()), (unmasked, Sampling(reference=1)), (Config(), Sampling())):
        config.check(sampling)


def test_an_untrained_one_can_be_copied_with_its_references(method):
    copied = copy.deepcopy(method)
    copied.load_state_dict({name: t.clone() for name, t in make_bigger(method.state_dict()).items()})
    assert len(copied.references) == 5


def make_bigger(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(state) | {"references": torch.zeros(5, 4, 8, 8)}
