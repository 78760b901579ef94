"""Custom Diffusion trains keys and values of the cross-attention and one word, on concept images zoomed in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from PIL import Image
from transformers import CLIPTokenizer

from personalize_core import steps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ZOOMS, ConceptLatents, Zoom, to_pixels, views_of, zooms
from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.methods.custom_diffusion.method import (
    Config,
    CustomDiffusion,
    cross_attention,
    leading,
    loss_mask,
)
from personalize_core.methods.custom_diffusion.recipe import Sampling
from personalize_core.methods.interface import Batch
from personalize_core.steps.latents import read_latents
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests import tiny_workspace
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, disturbed, predict, sample_latents, tiny_base, tiny_parts

PROMPT = "a photo of a <v> dog"


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: CustomDiffusion(Config(steps=3, **chosen), base, concept)


@pytest.fixture
def zoomed(images) -> ConceptLatents:
    """As many views of each concept image as there are zooms, each with other latents."""
    generator = torch.Generator().manual_seed(2)
    views = [moments + torch.randn(ZOOMS, 1, 1, 1, 1, generator=generator) for moments in images.concept]
    return ConceptLatents(views, images.class_images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_step(method: Any, base: Any, images: ConceptLatents, index: int = 0) -> Any:
    (stage,) = method.stages()
    return denoising_step(method, base, images, stage, seed=0, index=index)


# -- the zoom --------------------------------------------------------------------------------------------------


def by_the_code(concept_image: Image.Image, zoom: Zoom, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image in [-1, 1] and mask of the authors' finetune_data.py for one outcome of its draws; cells of 8 pixels.

    cx is the row and cy the column of the middle, as there.
    """
    half, whole, resample = zoom.side // 2, size // 2, Image.Resampling.BICUBIC
    if zoom.mirrored:
        concept_image = concept_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask = np.ones((size // 8, size // 8))
    if zoom.side < 0.6 * size:
        cx, cy = zoom.top + half, zoom.left + half
        assert half <= cx <= size - half and half <= cy <= size - half
        small = np.array(concept_image.resize((zoom.side, zoom.side), resample)) / 127.5 - 1.0
        image = np.zeros((size, size, 3))
        image[cx - half : cx + half, cy - half : cy + half, :] = small
        mask = np.zeros((size // 8, size // 8))
        mask[(cx - half) // 8 + 1 : (cx + half) // 8 - 1, (cy - half) // 8 + 1 : (cy + half) // 8 - 1] = 1.0
        return image, mask
    if zoom.side > size:
        cx, cy = zoom.top + whole, zoom.left + whole
        assert whole <= cx <= zoom.side - whole and whole <= cy <= zoom.side - whole
        large = np.array(concept_image.resize((zoom.side, zoom.side), resample)) / 127.5 - 1.0
        return large[cx - whole : cx + whole, cy - whole : cy + whole, :], mask
    return np.array(concept_image.resize((size, size), resample)) / 127.5 - 1.0, mask


@pytest.mark.parametrize("size", [128, 512])
def test_every_view_and_its_mask_are_an_outcome_of_the_authors_code(size):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    concept_image = Image.fromarray(pixels)
    views = views_of(Config().preprocessing, concept_image, size)
    found = zooms(size)
    assert len(views) == len(found) == ZOOMS
    for view, zoom in list(zip(views, found, strict=True))[:: 1 if size == 128 else 7]:
        image, mask = by_the_code(concept_image, zoom, size)
        ours = to_pixels([view])[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(ours, image, atol=0.0041)  # eight bits have no exact grey
        if zoom.kind != "far":
            np.testing.assert_allclose(ours, image, atol=1e-6)
        assert np.array_equal(loss_mask(zoom, size, size // 8, size // 8)[0].numpy(), mask)


def test_sizes_come_as_often_as_the_authors_code_samples_them():
    """finetune_data.py: two thirds up to the whole size, one third from 1.2 to 1.4 times; far is below 0.6."""
    random, sampled = np.random.default_rng(0), []
    for _ in range(40_000):
        low, high = (512 // 3, 512 + 1) if random.integers(0, 3) < 2 else (int(1.2 * 512), int(1.4 * 512))
        side = random.integers(low, high)
        sampled.append(side + side % 2)
    ours = np.array([zoom.side for zoom in zooms(512)])
    assert (ours % 2 == 0).all()
    for quantile in np.linspace(0.02, 0.98, 25):
        # the size below which that share lies, by as much as one of 60 views is apart from the next
        low, high = np.quantile(sampled, [max(0, quantile - 1 / 60), min(1, quantile + 1 / 60)])
        assert low - 4 <= np.quantile(ours, quantile, method="inverted_cdf") <= high + 4
    kinds = [zoom.kind for zoom in zooms(512)]
    shares = {"far": np.mean(np.array(sampled) < 0.6 * 512), "near": np.mean(np.array(sampled) > 512)}
    for kind, share in shares.items():
        assert abs(kinds.count(kind) / ZOOMS - share) < 1 / ZOOMS


@pytest.mark.parametrize("kind", ["far", "near"])
def test_places_and_mirror_images_are_spread_evenly(kind):
    chosen = [zoom for zoom in zooms(512) if zoom.kind == kind]
    for places in ([zoom.left for zoom in chosen], [zoom.top for zoom in chosen]):
        shares = np.sort([place / abs(zoom.side - 512) for place, zoom in zip(places, chosen, strict=True)])
        even = (np.arange(len(chosen)) + 0.5) / len(chosen)
        assert np.abs(shares - even).max() < 0.15
    assert sum(zoom.mirrored for zoom in chosen) == len(chosen) / 2


def test_the_first_view_is_the_concept_image_as_it_stands():
    concept_image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    expected = concept_image.resize((16, 16), Image.Resampling.BICUBIC)
    assert views_of(Config().preprocessing, concept_image, 16)[0].tobytes() == expected.tobytes()


def test_concept_images_are_cropped_to_their_middle_square_and_not_squashed():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (32, 1))).convert("RGB")
    first = np.asarray(views_of(Config().preprocessing, ramp, 32)[0])
    assert first[0, :, 0].tolist() == list(range(16, 48))


def test_class_images_are_mirrored_and_never_zoomed():
    recipe = Config().preprocessing.of_class_images
    assert recipe == Preprocessing("centre", "bicubic", flip=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    plain, mirrored = (np.asarray(view) for view in views_of(recipe, image, 16))
    assert np.array_equal(plain, np.asarray(image)) and np.array_equal(mirrored, np.asarray(image)[:, ::-1])


def test_without_zoom_concept_images_are_prepared_as_class_images_are():
    assert Config().preprocessing == Preprocessing("zoom", "bicubic", flip=True)
    assert Config(zoom=False).preprocessing == Preprocessing("centre", "bicubic", flip=True)


def test_an_image_too_small_to_leave_latents_inside_is_refused():
    with pytest.raises(ValueError, match="a concept image of 6 pixels leaves nothing of 4 x 4 latents to learn from"):
        loss_mask(Zoom("far", 6, 5, 5, False), 16, 4, 4)


@pytest.mark.parametrize(("size", "cells"), [(16, 8), (64, 16), (96, 12), (512, 64), (768, 96)])
def test_every_zoom_leaves_latents_to_learn_from(size, cells):
    assert all(loss_mask(zoom, size, cells, cells).any() for zoom in zooms(size))


# -- the rows --------------------------------------------------------------------------------------------------


def test_a_zoom_is_said_in_the_prompt(make, zoomed):
    method, said = make(regularization="none"), {"plain": set(), "far": set(), "near": set()}
    for seed in range(100):
        views = zoomed.instance_rows(3, generator(seed)).views
        for view, prompt in zip(views, method.batch(zoomed, 3, generator(seed)).prompts, strict=True):
            said[method.zooms[view].kind].add(prompt)
    plain = "photo of a <v> dog"
    assert said == {
        "plain": {plain},
        "far": {f"a far away {plain}", f"very small {plain}"},
        "near": {f"zoomed in {plain}", f"close up {plain}"},
    }


def test_without_zoom_nothing_is_said_and_everything_counts(make, images):
    batch = make(zoom=False, regularization="none").batch(images, 3, generator())
    assert set(batch.prompts) == {"photo of a <v> dog"}
    assert torch.equal(batch.weight, torch.full((3, 1, 8, 8), 1 / 3))


def test_class_images_come_with_the_authors_caption(make, images):
    assert make().batch(images, 2, generator()).prompts[2:] == ["photo of a dog"] * 2


def test_each_caption_stands_beside_its_own_image(make, images):
    captioned = ConceptLatents(images.concept, images.class_images, ["a dog in the desert", ""])
    said, method = ["a dog in the desert", "photo of a dog"], make(regularization="real")
    orders = set()
    for seed in range(10):
        batch = method.batch(captioned, 2, generator(seed))
        orders.add(batch.prompts[2])
        for latents, prompt in zip(batch.latents[2:], batch.prompts[2:], strict=True):
            assert (latents - captioned.class_images[said.index(prompt)][0, 0]).abs().mean() < 0.2
    assert orders == set(said)


def test_the_concepts_rows_are_the_same_with_and_without_class_images(make, zoomed):
    without, with_prior = (make(regularization=which).batch(zoomed, 3, generator(5)) for which in ("none", "generated"))
    assert len(without.prompts) == 3 and len(with_prior.prompts) == 6
    assert torch.equal(without.latents, with_prior.latents[:3])
    assert without.prompts == with_prior.prompts[:3] and torch.equal(without.weight, with_prior.weight[:3])


# -- the loss --------------------------------------------------------------------------------------------------


def naive_loss(prediction: np.ndarray, target: np.ndarray, masks: np.ndarray, prior_weight: float, scale: int) -> float:
    """L_inst + weight * L_reg, item by item; masks (b, h, w) are those of the concept's items."""
    size, instance = len(masks), []
    error = (prediction - target) ** 2
    for row in range(size):
        instance.append((masks[row] * error[row]).sum() / (4 * masks[row].sum()))
    regularization = error[size:].mean() if len(error) > size else 0.0
    return scale * float(np.mean(instance)) + prior_weight * float(regularization)


def with_every_kind_of_zoom(make: Callable, base: Any, zoomed: ConceptLatents, **chosen) -> tuple[Any, np.ndarray]:
    """A step that has a far, a near and a plain row, and the masks by which that can be computed again."""
    method = make(batch_size=6, **chosen)
    for index in range(50):
        step = a_step(method, base, zoomed, index)
        masks = np.stack(
            [
                loss_mask(zoom, 16, 8, 8)[0].numpy()
                for zoom in (next(z for z in method.zooms if shows(step.batch, row, z)) for row in range(6))
            ]
        )
        if 0 < (masks.mean(axis=(1, 2)) < 1).sum() < 6:
            return step, masks
    raise AssertionError("no such step")


def shows(batch: Batch, row: int, zoom: Zoom) -> bool:
    """Is that a zoom whose mask the row's weight has?"""
    return torch.equal(batch.weight[row] > 0, loss_mask(zoom, 16, 8, 8) > 0)


@pytest.mark.parametrize(
    "chosen", [{}, {"prior_weight": 0.3}, {"instance_scale": 4}, {"regularization": "none"}], ids=str
)
def test_the_loss_is_the_masked_mean_and_the_class_images_mean(chosen, make, base, zoomed):
    step, masks = with_every_kind_of_zoom(make, base, zoomed, **chosen)
    prediction, target = (tensor.detach().double().numpy() for tensor in (step.prediction, step.target))
    weight, scale = chosen.get("prior_weight", 1.0), chosen.get("instance_scale", 1)
    expected = naive_loss(prediction, target, masks, weight, scale)
    np.testing.assert_allclose(diffusion_loss(step).item(), expected, rtol=1e-5)


def test_its_gradient_is_that_of_finite_differences(make, base, zoomed):
    step, masks = with_every_kind_of_zoom(make, base, zoomed, prior_weight=0.3)
    step = dataclasses.replace(step, prediction=step.prediction.detach().double().requires_grad_())
    (gradient,) = torch.autograd.grad(diffusion_loss(step), step.prediction)
    prediction, target = step.prediction.detach().numpy(), step.target.double().numpy()
    random, seen = np.random.default_rng(0), set()
    for _ in range(60):
        place = tuple(int(random.integers(size)) for size in prediction.shape)
        values = []
        for change in (1e-4, -1e-4):
            moved = prediction.copy()
            moved[place] += change
            values.append(naive_loss(moved, target, masks, 0.3, 1))
        np.testing.assert_allclose(gradient[place].item(), (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-9)
        seen.add(bool(gradient[place] == 0))
    assert seen == {False, True}  # inside a mask and outside


def test_with_a_full_mask_it_is_the_sum_of_two_plain_means(make, base, images):
    step = a_step(make(zoom=False, batch_size=2), base, images)
    error = (step.prediction.detach().double().numpy() - step.target.double().numpy()) ** 2
    np.testing.assert_allclose(diffusion_loss(step).item(), error[:2].mean() + error[2:].mean(), rtol=1e-5)


def test_with_instance_scale_4_it_is_diffusers_loss(make, base, zoomed):
    """train_custom_diffusion.py: masked sum over the mask's sum, and a plain mean for the class images."""
    step, masks = with_every_kind_of_zoom(make, base, zoomed, instance_scale=4)
    pred, pred_prior = torch.chunk(step.prediction.detach(), 2, dim=0)
    target, target_prior = torch.chunk(step.target, 2, dim=0)
    mask = torch.from_numpy(masks)[:, None]
    loss = torch.nn.functional.mse_loss(pred, target, reduction="none")
    loss = ((loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    loss = loss + torch.nn.functional.mse_loss(pred_prior, target_prior, reduction="mean")
    torch.testing.assert_close(diffusion_loss(step).detach(), loss, rtol=1e-5, atol=0)


# -- what is trained -------------------------------------------------------------------------------------------


def test_gradients_exist_on_two_matrices_of_each_layer_and_one_row_alone(make, base, images):
    method = make().train()
    for module in (base.unet, base.text_encoders["text_encoder"]):
        module.requires_grad_(True)  # so that a gradient that ran into the base model would show
    with method.attach(base):
        diffusion_loss(a_step(method, base, images)).backward()
    names = {name for name, _ in method.weights.items()}
    assert names == {
        f"{layer}.transformer_blocks.0.attn2.{kind}.weight" for layer in LAYERS for kind in ("to_k", "to_v")
    }
    assert len(list(method.parameters())) == 2 * len(LAYERS) + 1
    # With one location, whose attention is the values' plain mean by its keys, a key may have no gradient at all.
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
    originals = dict(base.unet.named_parameters())
    assert all(originals[name].grad is None for name in names)


def test_the_whole_cross_attention_is_trained_if_wished(make, base):
    names = {name for name, _ in make(trained="attn2").weights.items()}
    kinds = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    assert names == {f"{layer}.transformer_blocks.0.attn2.{kind}" for layer in LAYERS for kind in kinds}


def test_the_start_tokens_gradient_is_stopped():
    """The gradient of a projection is a sum over tokens; the first is left out of it."""
    method: Any = CustomDiffusion(Config(), tiny_base(), Concept("v", "<v>", "dog"))
    random = np.random.default_rng(0)
    x, weight, above = random.normal(size=(2, 5, 3)), random.normal(size=(4, 3)), random.normal(size=(2, 5, 4))
    layer = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
    layer.weight.data = torch.from_numpy(weight)
    layer.register_forward_hook(method._detach_start)
    (layer(torch.from_numpy(x)) * torch.from_numpy(above)).sum().backward()
    assert layer.weight.grad is not None
    np.testing.assert_allclose(layer.weight.grad.numpy(), np.einsum("blo,bli->oi", above[:, 1:], x[:, 1:]), rtol=1e-10)


def test_it_is_stopped_in_training_alone(base, concept):
    method = CustomDiffusion(Config(), base, concept)
    keys = [attention.to_k for attention in cross_attention(base).values()]
    for training in (True, False):
        with method.train(training).attach(base):
            assert [bool(key._forward_hooks) for key in keys] == [training] * len(keys)


def test_stopping_it_changes_gradients_and_not_one_bit_of_the_prediction(base, concept, images):
    answers, gradients = [], []
    for stopped in (True, False):
        method = disturbed(CustomDiffusion(Config(detach_start=stopped), base, concept)).train()
        with method.attach(base):
            step = a_step(method, base, images)
            answers.append(step.prediction.detach())
            gradients.append(torch.autograd.grad(diffusion_loss(step), list(method.parameters())))
    assert torch.equal(*answers)
    (embedding, *stopped), (same, *free) = gradients
    torch.testing.assert_close(embedding, same)  # the start token stands before the concept, and knows nothing of it
    assert len(free) == 2 * len(LAYERS)
    assert all(not torch.equal(one, other) for one, other in zip(stopped, free, strict=True))


@pytest.mark.parametrize("trained", ["kv", "attn2"])
def test_gradients_are_those_of_diffusers_own_processor(trained, base, concept, images, tmp_path):
    """The same weights in CustomDiffusionAttnProcessor, the same latents, and its own stop at the start token."""
    method = disturbed(CustomDiffusion(Config(trained=trained), base, concept)).train()
    with method.attach(base):
        step = a_step(method, base, images)
        diffusion_loss(step).backward()

    pipe = fresh_pipeline(base)
    method.export(base, tmp_path)
    load(pipe, tmp_path)
    theirs = pipe.unet(step.x_t, step.t, step.context.hidden.detach()).sample
    torch.testing.assert_close(theirs, step.prediction, atol=1e-5, rtol=1e-5)
    diffusion_loss(dataclasses.replace(step, prediction=theirs)).backward()
    for name, weight in method.weights.items():
        path, inside = name.split(".attn2.")
        processor = pipe.unet.attn_processors[f"{path}.attn2.processor"]
        projection, rest = inside.split(".", 1)
        other = processor.get_parameter(f"{projection}_custom_diffusion.{rest}").grad
        torch.testing.assert_close(weight.grad, other, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("wanted", "word"), [(None, "sks"), ("mug", "mug")])
def test_the_word_starts_from_a_rare_one_or_the_chosen_one(wanted, word, base, concept):
    method = CustomDiffusion(Config(initial_word=wanted), base, concept)
    assert torch.equal(method.embedding.vector, base.word_embedding(word))


@pytest.fixture(scope="module")
def with_clips_words() -> BaseModel:
    """A tiny base model with the real vocabulary of Stable Diffusion 1's text encoder, which open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs, special = SimpleTokenizer(), {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(entry, entry): number for entry, number in theirs.encoder.items()}
    merges: Any = list(theirs.bpe_ranks)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token="<|endoftext|>")
    text = "a photo of sks dog, doghouse and ktn"
    assert tokenizer(text, add_special_tokens=False).input_ids == theirs.encode(text)
    parts: dict[str, Any] = {**tiny_parts(), "tokenizer": tokenizer}
    table = torch.nn.Embedding(len(vocabulary), 32)
    parts["text_encoder"].set_input_embeddings(table)
    return BaseModel(name="tiny", revision="local", weights_hash="tiny", **parts)


@pytest.mark.parametrize(
    ("wanted", "row"),
    [
        (None, 42170),  # "ktn" without the end-of-word mark: the row that both released codes start from
        ("ktn", 42170),
        ("mug", 9722),  # a word is meant as a word, "mug</w>", though "mug" is an entry too
    ],
)
def test_the_first_concept_starts_from_an_entry_of_clips_vocabulary(wanted, row, with_clips_words, concept):
    method = CustomDiffusion(Config(initial_word=wanted), with_clips_words, concept)
    assert torch.equal(method.embedding.vector, with_clips_words.text_encoders.tables[0].weight[row])
    assert len(with_clips_words.tokenizer.class_noun_ids("ktn")) == 2  # as a word it is two tokens


def test_what_is_neither_a_token_nor_an_entry_is_refused(base, concept):
    with pytest.raises(InputError, match="initial_word = 'teddy bear' is 2 tokens for this base model, and no entry"):
        CustomDiffusion(Config(initial_word="teddy bear"), base, concept)


def test_untrained_it_reads_as_that_word_before_the_class_noun(make, base):
    with torch.no_grad():
        said = make().condition(base, [PROMPT])(torch.tensor([0])).hidden
        assert torch.equal(said, base.encode(["a photo of a sks dog"]).hidden)


def test_it_trains_on_a_single_concept_image(make, base, zoomed):
    method = make(batch_size=2)
    log = train(method, base, ConceptLatents(zoomed.concept[:1], zoomed.class_images), seed=0)
    assert len(log) == 3 and all(np.isfinite(row["diffusion"]) for row in log)


# -- compression -----------------------------------------------------------------------------------------------


def by_compress_py(change: np.ndarray, share: float) -> np.ndarray:
    """The loop of the authors' compress.py."""
    u, s, vt = np.linalg.svd(change)
    explained, i = 0.0, 0
    for i, value in enumerate(s):  # noqa: B007  as there
        explained += value / s.sum()
        if explained > share:
            break
    return u[:, :i] @ np.diag(s)[:i, :i] @ vt[:i]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
def test_a_change_is_cut_to_its_leading_singular_values_as_the_authors_do(shape, share):
    change = np.random.default_rng(0).normal(size=shape)
    cut = leading(torch.from_numpy(change), share).numpy()
    np.testing.assert_allclose(cut, by_compress_py(change, share), atol=1e-10)
    assert np.linalg.matrix_rank(cut) < min(shape)


def test_what_has_not_changed_stays_as_it_is():
    assert torch.equal(leading(torch.zeros(4, 3), 0.6), torch.zeros(4, 3))


def test_compression_is_chosen_when_sampling_and_touches_keys_and_values_alone(base, concept):
    method = disturbed(CustomDiffusion(Config(trained="attn2"), base, concept)).eval()
    expected = sample_latents(method, base, [PROMPT])
    originals = dict(base.unet.named_parameters())
    method.sampling = Sampling(keep=0.6)
    assert not torch.equal(sample_latents(method, base, [PROMPT]), expected)
    learned = dict(method.weights.items())
    for name, weight in method._weights(base).items():
        if name.endswith(("to_k.weight", "to_v.weight")):
            change = (learned[name] - originals[name]).detach().double().numpy()
            np.testing.assert_allclose((weight - originals[name]).detach(), by_compress_py(change, 0.6), atol=2e-4)
        else:
            assert torch.equal(weight, learned[name])
    method.sampling = Sampling()
    assert torch.equal(sample_latents(method, base, [PROMPT]), expected)


def test_training_knows_no_compression(make, base, concept):
    method = disturbed(make())
    context = base.encode([PROMPT], concept)
    with method.train().attach(base):
        expected = predict(base, context)
    method.sampling = Sampling(keep=0.1)
    with method.attach(base):
        assert torch.equal(predict(base, context), expected)


# -- export ----------------------------------------------------------------------------------------------------


def load(pipe: Any, folder: Path) -> None:
    name = "pytorch_custom_diffusion_weights.safetensors"
    pipe.unet.load_attn_procs(folder, weight_name=name, _pipeline=pipe)


@pytest.mark.parametrize("keep", [1.0, 0.6])
@pytest.mark.parametrize("trained", ["kv", "attn2"])
def test_it_loads_as_attention_processors_and_predicts_the_same(trained, keep, base, tmp_path):
    method: Any = disturbed(CustomDiffusion(Config(trained=trained), base, Concept("v", "<v>", "teddy bear"))).eval()
    method.sampling = Sampling(keep=keep)
    how = method.export(base, tmp_path)
    assert "load_attn_procs" in how and "_pipeline=pipe" in how and "'<v> teddy bear'" in how
    pipe = fresh_pipeline(base)
    load(pipe, tmp_path)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    processors = pipe.unet.attn_processors.values()
    assert all(isinstance(processor, CustomDiffusionAttnProcessor) for processor in processors)
    assert sum(processor.train_kv for processor in processors) == len(LAYERS)
    check_same(pipe, "a photo of <v> teddy bear on the beach", method, base)


# -- class images ----------------------------------------------------------------------------------------------


def test_it_asks_for_class_images_only_if_it_uses_them():
    asked = {which: Config(regularization=which).class_images_needed for which in KINDS}
    assert asked == {"generated": 200, "real": 200, "none": 0}
    assert Config(class_images=30).class_images_needed == 30
    assert [Config(regularization=which).real_class_images for which in KINDS] == [False, True, False]


KINDS: Any = ("generated", "real", "none")


def test_real_class_images_are_concept_images_from_a_folder_with_their_captions(tmp_path):
    store = tiny_workspace.make(tmp_path)
    values = tiny_workspace.params(tmp_path)
    recipe = {"steps": 2, "batch_size": 2, "regularization": "real"}
    values["methods"] = {"base_model": {}, "custom_diffusion": {values["base_model"]: recipe}}
    store = tiny_workspace.write_params(store.root, values)
    with pytest.raises(
        InputError, match="regularization/dog does not exist; put concept images .* its caption in 'NAME.txt'"
    ):
        steps.check_inputs(store, ["rex"], ["custom_diffusion"])

    tiny_workspace.paint_concept_images(store.regularization("dog"), count=3, seed=4)
    (store.regularization("dog") / "1.txt").write_text("a dog in\nthe desert\n")
    steps.check_inputs(store, ["rex"], ["custom_diffusion"])
    assert not steps.train(store, "rex", "custom_diffusion").skipped
    made = store.real_class_latents("dog", Config().preprocessing.of_class_images.key)
    assert read_json(made / "captions.json") == ["", "a dog in the desert", ""]
    assert not store.class_images("dog").exists()  # the base model drew nothing
    images = read_latents(store, "rex", "custom_diffusion", made)
    assert len(images.class_images) == 3 and len(images.concept[0]) == ZOOMS
    assert steps.train(store, "rex", "custom_diffusion").skipped

    (store.regularization("dog") / "1.txt").write_text("a red dog")
    assert not steps.train(store, "rex", "custom_diffusion").skipped
    (store.regularization("dog") / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="1.txt is text in UTF-16; save it as UTF-8"):
        steps.check_inputs(store, ["rex"], ["custom_diffusion"])


def test_the_recipe_is_the_authors():
    """docs/methods.md#custom-diffusion: 4 + 4 images, 8e-5, 250 steps, 200 generated class images, weights equal."""
    c = Config()
    assert (c.batch_size, c.lr, c.steps, c.class_images, c.prior_weight) == (4, 8e-5, 250, 200, 1.0)
    assert (c.trained, c.regularization, c.instance_scale) == ("kv", "generated", 1)
    assert c.zoom and c.detach_start and Sampling().keep == 1


def test_it_names_the_concept_by_placeholder_and_noun(make, base):
    assert make().say("a photo of a {}") == PROMPT
    assert len(cross_attention(base)) == len(LAYERS)
