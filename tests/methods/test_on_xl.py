"""What methods are on Stable Diffusion XL beyond their formulas: pairs of embeddings, and several layers a transformer.

Computed by hand in NumPy, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from personalize_core.base_model.attention import AttentionMaps, by_transformer
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods import method_class
from personalize_core.methods.dti.method import SphereDescent
from personalize_core.methods.shared.context_regularizer import PromptPair, context_losses
from personalize_core.methods.shared.lag import above_median, region
from personalize_core.methods.shared.options import ContextLosses, Refinement
from personalize_core.sampling.test_time_optimization import ContextRefined
from personalize_core.training.loop import train
from tests.conftest import a_step, disturbed, tiny_images, tiny_xl

CONCEPT = Concept("v", "<v>", "dog")
FIRST, SECOND = slice(0, 32), slice(32, 48)  # the halves of a pair, of what both encoders say, and of each word
TRANSFORMERS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)


@pytest.fixture(scope="module")
def xl() -> BaseModel:
    return tiny_xl()


def made(name: str, base: BaseModel, **chosen: Any) -> Any:
    kind: Any = method_class(name)
    return kind(kind.Config(**chosen), base, CONCEPT)


def array(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def norms(vector: torch.Tensor) -> list[float]:
    v = array(vector)
    return [float(np.linalg.norm(v[FIRST])), float(np.linalg.norm(v[SECOND]))]


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_value_of_each_layer_becomes_one_of_each_transformer(xl):
    values = torch.arange(16.0).view(8, 2)
    found = by_transformer(values, xl.layers)
    assert found.tolist() == [[1, 2], [5, 6], [9, 10], [13, 14]]
    assert torch.equal(by_transformer(values[:4], TRANSFORMERS), values[:4])  # where each has one layer


def test_lag_looks_where_the_mean_of_a_transformers_layers_is_above_its_median(xl):
    said = xl.encode(["a photo of <v> dog on the beach"], CONCEPT)
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def look(path: str) -> Any:
        def hook(*call: Any) -> None:
            maps = [array(xl.call.maps[layer])[0] for layer in xl.call.maps if layer.startswith(path)]
            words = array(xl.call.context.concept[0])
            mean = np.mean([(one * words).sum(-1).mean(0) for one in maps], axis=0)
            seen.append((path, region(xl.call, path, 0, "reuse")[0], above_median(torch.from_numpy(mean)[None])[0]))
            assert len(maps) == 2

        return hook

    handles = [xl.transformers[path].register_forward_hook(look(path)) for path in TRANSFORMERS]
    try:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            xl.denoise(noise, torch.tensor([500]), said)
    finally:
        for handle in handles:
            handle.remove()
    assert [path for path, _, _ in seen] == list(TRANSFORMERS)
    assert all(torch.equal(found, expected) and found.any() for _, found, expected in seen)


def test_attndreambooths_penalty_is_the_mean_over_transformers_of_their_layers_means(xl):
    method: Any = disturbed(made("attn_dreambooth", xl)).train()
    with method.attach(xl):
        step = a_step(method, xl, tiny_images(), stage=1)
        found = method.attention_penalty(step, 2.0, 5.0)
    of_layers = {"mean": [], "var": []}
    for layer in xl.layers:
        maps = array(step.maps[layer])  # (B, heads, h*w, L)
        values = [
            np.stack([maps[row][..., array(mask[row]).astype(bool)].mean(-1).ravel() for row in range(len(maps))])
            for mask in (step.context.placeholder, step.context.class_noun)
        ]
        of_layers["mean"].append((values[0].mean(1) - values[1].mean(1)) ** 2)
        of_layers["var"].append((values[0].var(1, ddof=1) - values[1].var(1, ddof=1)) ** 2)
    # two layers in each of four transformers: the same as over all layers here, but for how it is put together
    expected = {key: np.mean(np.array(rows).reshape(4, 2, -1).mean(1), axis=0).sum() for key, rows in of_layers.items()}
    assert found["attention_mean"].item() == pytest.approx(2.0 * expected["mean"], rel=1e-3)
    assert found["attention_variance"].item() == pytest.approx(5.0 * expected["var"], rel=1e-3)


def test_transformers_count_alike_however_many_layers_they_have():
    """Three layers, of which two are of one transformer."""
    layers = ("a.transformer_blocks.0", "a.transformer_blocks.1", "b")
    assert by_transformer(torch.tensor([[1.0], [3.0], [10.0]]), layers).mean(dim=0).item() == 6


@pytest.mark.parametrize("axis", ["token", "feature"])
def test_the_loss_of_context_embeddings_is_the_mean_of_both_encoders(axis, xl):
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    pair = PromptPair.of(xl, CONCEPT, "a photo of {} on the beach", "<v>")
    context = xl.encode([pair.concept_prompt], CONCEPT, vector)
    how = ContextLosses(cer_weight=1.0, car_weight=0.0, cer_axis=axis)
    x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    found = context_losses(how, xl, CONCEPT, pair, lambda t: context, x_t, t)["context_embedding"]
    ours = array(context.hidden[0, pair.concept_positions])
    theirs = array(xl.encode([pair.class_prompt], CONCEPT).hidden[0, pair.class_positions])
    losses = []
    for half in (FIRST, SECOND):
        a, b = ours[:, half], theirs[:, half]
        pairs = zip(a, b, strict=True) if axis == "feature" else zip(a.T, b.T, strict=True)
        losses.append(1 - np.mean([cosine(*each) for each in pairs]))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=0.01)  # else one encoder would do


def test_the_loss_of_context_attention_is_the_mean_over_transformers(xl):
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    pair = PromptPair.of(xl, CONCEPT, "a photo of {} on the beach", "<v>")
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([300, 700])
    context = xl.encode([pair.concept_prompt] * 2, CONCEPT, vector)
    how = ContextLosses(cer_weight=0.0, car_weight=1.0)
    found = context_losses(how, xl, CONCEPT, pair, lambda t: context, x_t, t)["context_attention"]
    ours, theirs = AttentionMaps(), AttentionMaps()
    with torch.no_grad():
        xl.denoise(x_t, t, context, ours)
        xl.denoise(x_t, t, xl.encode([pair.class_prompt] * 2, CONCEPT), theirs)
    squares = []
    for layer in xl.layers:
        one = array(ours[layer]).mean((1, 2))[:, pair.concept_positions]
        other = array(theirs[layer]).mean((1, 2))[:, pair.class_positions]
        squares.append(((one - other) ** 2).mean(-1).sum())
    assert found.item() == pytest.approx(np.mean(np.reshape(squares, (4, 2)).mean(1)), rel=1e-3)


def test_core_keeps_the_norm_of_each_half(xl):
    method = made("core", xl, embedding_steps=2, rescale_after=0.5, rescale_until=1.0)
    with torch.no_grad():
        method.embedding.vector[FIRST] *= 2
    method.rescale(0)  # the norms that it had after that step
    kept = norms(method.embedding.vector)
    with torch.no_grad():
        method.embedding.vector[FIRST] *= 3
        method.embedding.vector[SECOND] *= 0.5
    direction = array(method.embedding.vector)
    method.rescale(1)
    assert norms(method.embedding.vector) == pytest.approx(kept, rel=1e-5)
    for half in (FIRST, SECOND):
        assert cosine(array(method.embedding.vector)[half], direction[half]) == pytest.approx(1, abs=1e-6)
    assert method.norm.tolist() == pytest.approx(kept, rel=1e-6)


def test_dco_keeps_the_norm_of_each_half_of_the_class_noun(xl):
    method = made("dco", xl, steps=3, batch_size=2, rank=2, embedding_lr=0.1)
    start = norms(xl.word_embedding("dog"))
    train(method, xl, tiny_images(), seed=0)
    assert norms(method.embedding.vector) == pytest.approx(start, rel=1e-5)
    moved = [
        cosine(array(method.embedding.vector)[half], array(xl.word_embedding("dog"))[half]) for half in (FIRST, SECOND)
    ]
    assert max(moved) < 0.9999


def test_dti_goes_on_a_sphere_for_each_half():
    """One step by hand: v <- normalize(v - lr g / |g|) with g made tangent, times the half's own radius."""
    generator = torch.Generator().manual_seed(0)
    e, gradient = torch.randn(48, generator=generator), torch.randn(48, generator=generator)
    radii, lr = [torch.tensor(2.0), torch.tensor(0.5)], 0.3
    vector = e.clone().requires_grad_()
    vector.grad = gradient.clone()
    SphereDescent([{"params": [vector], "lr": lr}], radii, (32, 16)).step()
    for half, radius in ((FIRST, 2.0), (SECOND, 0.5)):
        v, g = array(e)[half] / np.linalg.norm(array(e)[half]), array(gradient)[half]
        tangent = g - (g @ v) * v
        to = v - lr * tangent / np.linalg.norm(tangent)
        np.testing.assert_allclose(array(vector)[half], radius * to / np.linalg.norm(to), rtol=1e-5)


def test_dti_starts_on_both_vocabularies_mean_norms_and_its_prior_is_the_sum_of_both(xl):
    method: Any = made("dti", xl)
    means = [float(np.linalg.norm(array(table.weight), axis=1).mean()) for table in xl.text_encoders.tables]
    assert norms(method.embedding.vector) == pytest.approx(means, rel=1e-5)
    disturbed(method)
    step = a_step(method, xl, tiny_images())
    start, now = array(method.embedding.initial), array(method.embedding.vector)
    expected = sum(start[h] @ now[h] / np.linalg.norm(start[h]) ** 2 for h in (FIRST, SECOND))
    (stage,) = method.stages()
    assert stage.penalties(step)["prior"].item() == pytest.approx(-method.config.kappa * expected, rel=1e-4)


def test_classdiffusion_compares_what_each_encoder_says_at_the_end(xl):
    method: Any = disturbed(made("class_diffusion", xl))
    step = a_step(method, xl, tiny_images())
    (stage,) = method.stages()
    concept = xl.encode([method.phrase], CONCEPT, method.embedding.vector)
    noun = xl.encode(["dog"], CONCEPT)
    ends = [array(each.hidden[0])[int(each.end[0].int().argmax())] for each in (concept, noun)]
    expected = 1 - np.mean([cosine(ends[0][half], ends[1][half]) for half in (FIRST, SECOND)])
    found = stage.penalties(step)["semantic_preservation"].item()
    assert found == pytest.approx(method.config.spl_weight * expected, rel=1e-4)


def test_test_time_optimization_brings_the_losses_down_and_leaves_the_artifact(xl):
    method = made("textual_inversion", xl).eval().requires_grad_(False)
    disturbed(method)
    before = method.embedding.vector.clone()
    latents = ConceptLatents(tiny_images().concept)
    refined = ContextRefined(method, latents, seed=0, refinement=Refinement(steps=8, lr=0.05, cer_weight=1.0))
    refined.refine(xl, ["a photo of <v> on the beach"], lambda done, steps, loss: None)
    (losses,) = refined.losses.values()
    assert losses[-1] < losses[0]
    assert torch.equal(method.embedding.vector, before)
    (vector,) = refined.refined.values()
    assert vector.shape == (48,) and not torch.equal(vector, before)


def one_by_one(base: BaseModel, prompts: list[str], vectors: torch.Tensor) -> torch.Tensor:
    """(V, B, L, D): what the layers read of the prompts with each vector, (V, D), in the placeholder's place."""
    return torch.stack([base.encode(prompts, CONCEPT, vector).hidden for vector in vectors])


@pytest.mark.parametrize("hooked", [False, True], ids=["shared parts once", "all of each"])
def test_variants_of_prompts_are_read_by_both_encoders_as_one_by_one(hooked, xl):
    prompts = ["a photo of <v> dog", "<v> on the red beach", "the jungle"]
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(4))
    handles = [table.register_forward_hook(lambda *call: None) for table in xl.text_encoders.tables if hooked]
    try:
        found = xl.prompt_reader.encode_variants(prompts, CONCEPT, vectors[:, None])
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(
        xl.prompt_reader.final_norm(found.hidden), one_by_one(xl, prompts, vectors), atol=1e-5, rtol=1e-4
    )
    assert found.rows.tolist() == [0, 1] and found.positions.tolist() == [4, 1]


def test_in_xti_all_layers_of_a_transformer_read_by_its_embedding_and_the_unet_is_told_of_their_mean(xl):
    method: Any = disturbed(made("xti", xl))
    assert method.embeddings.shape == (4, 48)
    prompts = ["a photo of <v>", "<v> in the desert", "a photo of <v>"]
    context = method.condition(xl, prompts)(torch.tensor([500] * 3))
    expected = one_by_one(xl, prompts, method.embeddings.detach())
    for index, layer in enumerate(xl.layers):
        number = TRANSFORMERS.index(xl.blocks[layer].transformer)
        for text in context.layer(index):
            torch.testing.assert_close(text, expected[number], atol=1e-5, rtol=1e-4)
    mean = xl.encode(prompts, CONCEPT, method.embeddings.detach().mean(dim=0))
    torch.testing.assert_close(context.pooled, mean.pooled, atol=1e-5, rtol=1e-4)
    assert xl.transformer_of_layer == (0, 0, 1, 1, 2, 2, 3, 3)


def test_in_neti_one_mapper_speaks_to_both_encoders_at_the_norm_of_each(xl):
    """Embedding and bypass of an encoder together have the norm of the class noun's embedding there."""
    method: Any = disturbed(made("neti", xl)).eval()
    embedding, bypass = method.mapper(torch.tensor([100, 800]))
    assert embedding.shape == bypass.shape == (4, 2, 48)
    for half, norm in zip((FIRST, SECOND), norms(xl.word_embedding("dog")), strict=True):
        both = np.concatenate([array(embedding)[..., half], array(bypass)[..., half]], axis=-1)
        np.testing.assert_allclose(np.linalg.norm(both, axis=-1), norm, rtol=1e-5)


def test_in_neti_layers_read_by_time_and_transformer_and_values_have_a_bypass_of_each_encoder(xl):
    """h' = h + 0.2 |h| b / |b| at the placeholder, for what each encoder says there; keys have none."""
    method: Any = disturbed(made("neti", xl)).eval()
    prompts, t = ["a photo of <v>", "<v> in the desert"], torch.tensor([100, 800])
    embedding, bypass = method.mapper(t)
    context = method.condition(xl, prompts)(t)
    places = context.placeholder.int().argmax(dim=1).tolist()
    for index, number in enumerate(xl.transformer_of_layer):
        keys, values = context.layer(index)
        read = xl.encode(prompts, CONCEPT, embedding[number][:, None]).hidden
        torch.testing.assert_close(keys, read, atol=1e-5, rtol=1e-4)
        expected = array(read)
        for row, place in enumerate(places):
            for half in (FIRST, SECOND):
                h, b = array(read)[row, place, half], array(bypass)[number, row, half]
                expected[row, place, half] = h + 0.2 * np.linalg.norm(h) * b / np.linalg.norm(b)
        np.testing.assert_allclose(array(values), expected, atol=1e-4, rtol=1e-4)
    mean = xl.encode(prompts, CONCEPT, embedding.mean(dim=0)[:, None])
    torch.testing.assert_close(context.pooled, mean.pooled, atol=1e-5, rtol=1e-4)


def test_texts_of_transformers_go_with_both_halves_of_guidance_and_with_parts(xl):
    method: Any = disturbed(made("xti", xl))
    said = method.condition(xl, ["a photo of <v>", "<v> in the desert"])(torch.tensor([500, 500]))
    empty = method.condition(xl, ["", ""])(torch.tensor([500, 500]))
    halves = TextContext.guidance(empty, said)
    for index in range(len(xl.layers)):
        keys, _ = halves.layer(index)
        assert torch.equal(keys, torch.cat([empty.hidden, said.layer(index)[0]]))
        assert torch.equal(said.part(slice(1, 2)).layer(index)[0], said.layer(index)[0][1:])
        assert torch.equal(said.and_again().layer(index)[0], said.layer(index)[0].repeat(2, 1, 1))


def test_vicos_blocks_stand_behind_the_last_text_block_of_every_second_transformer_of_the_decoder(xl):
    """The tiny decoder has two transformers. What the noisy rows' block adds is by hand: a mask by Otsu's threshold."""
    method: Any = disturbed(made("vico", xl)).eval()
    last = "up_blocks.0.attentions.1.transformer_blocks.1"
    assert method.layers == (last,) and method.blocks.paths() == [last]
    method.references = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts = ["a photo of <v>", "<v> in the desert"]
    seen: dict[str, Any] = {}

    def entered(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["x"], seen["r"], seen["mask"] = args[0], kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]

    def told(unet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["rows"], seen["told"] = len(args[0]), kwargs["added_cond_kwargs"]

    context = method.condition(xl, prompts)(torch.tensor([500, 500]))
    x_t, maps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6)), AttentionMaps()
    text_block = xl.blocks[last].module
    with torch.no_grad(), method.attach(xl):
        handles = [
            method.blocks.of(last).register_forward_pre_hook(entered, with_kwargs=True),
            xl.unet.register_forward_pre_hook(told, with_kwargs=True),
            text_block.attn2.to_q.register_forward_hook(lambda module, args, query: seen.update(query=query)),
        ]
        try:
            xl.denoise(x_t, torch.tensor([500, 500]), context, maps)
        finally:
            for handle in handles:
                handle.remove()
    assert seen["rows"] == 4 and torch.equal(seen["told"]["text_embeds"], context.pooled.repeat(2, 1))
    assert seen["told"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
    keys = array(text_block.attn2.to_k(context.hidden)).reshape(2, 77, 4, 8)  # four heads
    queries = array(seen["query"])[2:].reshape(2, -1, 4, 8)  # of the references
    for row, place in enumerate(context.placeholder.int().argmax(dim=1).tolist()):
        scores = np.einsum("nhd,lhd->hnl", queries[row], keys[row]) / np.sqrt(8)
        looked = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        own = looked[..., place].mean(0)
        own = (own - own.min()) / (own.max() - own.min())
        thresholds = [tenth / 10 for tenth in range(10)]
        between = [own[own < at].size * own[own >= at].size * (own[own < at].mean() - own[own >= at].mean()) ** 2
                   if (own < at).any() else 0.0 for at in thresholds]  # fmt: skip
        assert (
            array(seen["mask"])[row, 0].astype(bool).tolist() == (own >= thresholds[int(np.argmax(between))]).tolist()
        )
    assert list(maps) == list(xl.layers) and all(len(maps[layer]) == 2 for layer in maps)


def test_vico_without_its_blocks_is_the_base_model(xl):
    method: Any = made("vico", xl, image_attention=False, regularizer=0.0).eval()
    prompts = [method.say("a photo of {}")]
    noise, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
    context = method.condition(xl, prompts)(t)
    expected = xl.denoise(noise, t, context)
    with method.attach(xl):
        assert torch.equal(xl.denoise(noise, t, context), expected)
