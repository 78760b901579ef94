"""Stable Diffusion XL: what is read of prompts, what the U-Net is told, and images, against diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from personalize_core.base_model.loading import PUBLISHED, identify, load_base_model
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.sampling.sampler import denoiser, initial_noise, make_sampler
from personalize_core.training.loop import add_gradients, noisy_rows
from tests.conftest import (
    disturbed,
    sample_latents,
    stock_pipeline,
    tiny_images,
    tiny_tokenizer,
    tiny_xl,
    tiny_xl_parts,
    unpersonalized,
)
from tests.every_method.cases import Case

PROMPTS = ["a photo of the sks dog on the beach", "a red mug"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return stock_pipeline(tiny_xl_parts())


@pytest.fixture(scope="module")
def xl() -> BaseModel:
    return tiny_xl()


def test_prompts_are_read_as_the_stock_pipeline_reads_them(pipe, xl):
    context = xl.encode(PROMPTS)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(context.hidden, hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(context.pooled, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero", [True, False])
def test_an_empty_prompt_reads_what_the_stock_pipeline_gives_guidance(zero):
    """Zeros where its configuration says so, else the empty text."""
    parts = tiny_xl_parts()
    pipe, base = stock_pipeline(parts), tiny_xl(empty_prompt_is_zero=zero)
    pipe.register_to_config(force_zeros_for_empty_prompt=zero)
    context = base.encode(["", PROMPTS[0]])
    with torch.no_grad():
        said, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS[0])
    for ours, theirs in ((context.hidden, (empty, said)), (context.pooled, (empty_pooled, pooled))):
        torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=0)
    assert bool(context.hidden[0].any()) != zero


def test_the_two_tokenizers_pad_otherwise_and_find_the_words_at_the_same_places(xl, concept):
    tokens, alone = xl.tokenizer(["a photo of <v> dog"], concept), xl.tokenizer._second
    (own,) = alone(["a photo of <placeholder> dog"], padding="max_length", max_length=77).input_ids
    place = int(tokens.placeholder[0].int().argmax())
    assert own[place] == alone.convert_tokens_to_ids("<placeholder>")
    own[place] = xl.tokenizer.rare_id
    assert tokens.second_ids.tolist() == [own] and not torch.equal(tokens.second_ids, tokens.ids)
    assert torch.equal(tokens.second_ids * tokens.words, tokens.ids * tokens.words)


def test_a_concepts_embedding_is_a_pair_each_read_by_its_own_encoder(xl, concept):
    """As if each encoder's table had the one half in the rare token's place."""
    vector = torch.randn(xl.text_width, generator=torch.Generator().manual_seed(2))
    read = xl.encode(["a photo of <v> dog"], concept, vector)
    parts = tiny_xl_parts()
    rare = parts["tokenizer"].convert_tokens_to_ids("sks</w>")
    with torch.no_grad():
        parts["text_encoder"].get_input_embeddings().weight[rare] = vector[:32]
        parts["text_encoder_2"].get_input_embeddings().weight[rare] = vector[32:]
        hidden, _, pooled, _ = stock_pipeline(parts).encode_prompt(
            ["a photo of sks dog"], do_classifier_free_guidance=False
        )
    torch.testing.assert_close(read.hidden, hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(read.pooled, pooled, atol=1e-5, rtol=0)
    assert torch.equal(xl.rare_embedding(), xl.text_encoders.vocabulary[rare]) and xl.rare_embedding().shape == (48,)


@pytest.mark.parametrize("sizes", [None, ((100, 80), (3, 5), (16, 16))])
def test_the_unet_is_told_the_sizes_that_the_stock_pipeline_tells_it(pipe, xl, sizes):
    """Original height and width, top and left of the crop, target height and width; by default of a whole image."""
    told: list[dict[str, torch.Tensor]] = []
    look = xl.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: told.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    context = xl.encode(PROMPTS)
    if sizes:
        own = torch.tensor([[*sizes[0], *sizes[1], *sizes[2]]], dtype=torch.float32).expand(2, -1)
        context = TextContext(**{**vars(context), "sizes": own})
    try:
        xl.denoise(torch.zeros(2, 4, 8, 8), torch.tensor([500, 500]), context)
    finally:
        look.remove()
    expected = pipe._get_add_time_ids(*(sizes or ((16, 16), (0, 0), (16, 16))), torch.float32, 24)
    torch.testing.assert_close(told[0]["time_ids"], expected.expand(2, -1), atol=1e-5, rtol=0)
    assert told[0]["text_embeds"] is context.pooled


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("ddim", lambda config: DDIMScheduler.from_config(config)),
        ("dpm-solver++", lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")),
    ],
)
def test_images_are_the_stock_pipelines_on_the_same_noise(pipe, xl, concept, name, stock):
    pipe.scheduler = stock(xl.scheduler.config)
    noise = initial_noise(xl, 0, [(0, 0), (1, 0)])
    theirs = pipe(
        PROMPTS, height=16, width=16, num_inference_steps=4, guidance_scale=5.0, latents=noise, output_type="latent"
    ).images
    method = unpersonalized(xl, concept)
    with torch.no_grad():
        ours = make_sampler(name, xl)(denoiser(method, xl, PROMPTS, 5.0), noise, 4)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_another_image_size_makes_images_of_it_and_is_told_to_the_unet(pipe, concept):
    base = tiny_xl(image_size=24)
    assert base.latent_shape == (4, 12, 12)
    pipe.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    theirs = pipe(
        PROMPTS, height=24, width=24, num_inference_steps=2, guidance_scale=6.0, output_type="latent",
        latents=initial_noise(base, 0, [(0, 0), (1, 0)]),
    ).images  # fmt: skip
    ours = sample_latents(unpersonalized(base, concept), base, PROMPTS)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert base.decode(ours).shape == (2, 24, 24, 3)


@pytest.mark.parametrize("size", [1, 22, 23])
def test_a_size_that_does_not_divide_is_refused(size):
    """Two pixels a latent, and one more halving in the U-Net."""
    with pytest.raises(InputError, match=rf"image_size = {size} does not divide.* multiples of 4 pixels"):
        tiny_xl(image_size=size)


def test_the_gradient_reaches_the_embedding_through_the_pooled_text_too(xl, concept):
    """In training, where the text has a graph of its own (`TextContext.cut_off`): with the hidden states held fixed,
    some of the gradient is left, and both ways together are the gradient of the whole."""
    method: Any = Case("textual_inversion", "xl").make(xl, concept).train()
    (stage,) = method.stages()
    rows = noisy_rows(method, xl, tiny_images(), stage, seed=0, index=0)

    def gradient(of: str) -> torch.Tensor:
        method.zero_grad()
        context = xl.encode(rows.batch.prompts, concept, method.embedding.vector)
        held: dict[str, Any] = {
            field: getattr(context, field).detach() for field in ("hidden", "pooled") if of not in (field, "both")
        }
        prediction = xl.denoise(rows.x_t, rows.t, TextContext(**{**vars(context), **held}))
        (rows.batch.weight * (prediction - rows.target).pow(2)).mean(dim=(1, 2, 3)).sum().backward()
        return method.embedding.vector.grad.clone()

    hidden, pooled, both = map(gradient, ("hidden", "pooled", "both"))
    assert pooled.norm() > 1e-3 * both.norm()
    torch.testing.assert_close(hidden + pooled, both, atol=1e-6, rtol=1e-4)
    method.zero_grad()
    add_gradients(stage, method, xl, rows, [slice(0, 1), slice(1, 2)])
    torch.testing.assert_close(method.embedding.vector.grad, both, atol=1e-6, rtol=1e-4)


def test_the_pooled_text_and_sizes_of_both_halves_stay_with_their_rows(xl, concept):
    """Of guidance, of a part of a batch, and of rows that are passed twice."""
    said, empty = xl.encode(PROMPTS, concept), xl.encode(["", ""], concept)
    assert said.pooled is not None and empty.pooled is not None
    halves = TextContext.guidance(empty, said)
    assert halves.pooled is not None and torch.equal(halves.pooled, torch.cat([empty.pooled, said.pooled]))
    sized = TextContext(**{**vars(said), "sizes": torch.arange(12.0).view(2, 6)})
    part, again = sized.part(slice(1, 2)), sized.and_again()
    assert part.pooled is not None and torch.equal(part.pooled, said.pooled[1:]) and part.sizes is not None
    assert part.sizes.tolist() == [[6, 7, 8, 9, 10, 11]]
    assert again.pooled is not None and torch.equal(again.pooled, said.pooled.repeat(2, 1))
    assert again.sizes is not None and torch.equal(again.sizes, torch.arange(12.0).view(2, 6).repeat(2, 1))


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock_pipeline(tiny_xl_parts()).save_pretrained(tmp_path / "xl")
    return tmp_path / "xl"


@pytest.fixture(autouse=True)
def forget_loaded():
    load_base_model.cache_clear()


def test_a_folder_is_loaded_as_what_it_is(folder, xl, concept):
    loaded = load_base_model(str(folder), "cpu")
    assert loaded.layers == xl.layers and loaded.text_width == 48
    prompts = ["a photo of the <v> dog", "a red mug"]
    expected = sample_latents(unpersonalized(xl, concept), xl, prompts)
    assert torch.equal(sample_latents(unpersonalized(loaded, concept), loaded, prompts), expected)


def test_what_the_pipeline_says_of_empty_prompts_is_read_and_part_of_the_identity(folder):
    before = identify(str(folder)).weights_hash
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert load_base_model(str(folder), "cpu").encode([""]).hidden.any()
    assert identify(str(folder)).weights_hash != before


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "text_encoder", "model_index.json"])
def test_a_folder_without_a_part_says_what_is_missing(folder, part):
    """Without the first text encoder it is laid out as the published refiner, which makes no images by itself."""
    path = folder / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(InputError, match=f"it has no {part}"):
        identify(str(folder))


def test_the_second_encoders_weights_are_part_of_the_identity(folder):
    before = identify(str(folder))
    for file in (folder / "text_encoder_2").glob("*.safetensors"):
        file.write_bytes(file.read_bytes() + b" ")
    assert identify(str(folder)).hash_of("text_encoder_2") != before.hash_of("text_encoder_2")
    assert identify(str(folder)).weights_hash != before.weights_hash


def test_a_unet_that_is_told_of_something_else_is_refused(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"addition_embed_type": "image"}))
    with pytest.raises(InputError, match=r"addition_embed_type is 'image', .* take one of these"):
        identify(str(folder))


def test_tokenizers_of_different_vocabularies_are_refused():
    parts = tiny_xl_parts()
    parts["tokenizer_2"] = tiny_tokenizer()
    parts["tokenizer_2"].add_tokens(["another"])
    with pytest.raises(InputError, match="two tokenizers have different vocabularies"):
        BaseModel(name="tiny", revision="local", weights_hash="tiny", **parts)


def test_the_published_ones_differ_in_the_autoencoder_alone():
    own, half = (dict(identify(name).hashes) for name in ("sdxl-base-1.0", "sdxl-base-1.0-fp16-vae"))
    assert {part for part in own if own[part] != half[part]} == {"vae"}
    assert half["vae"] == "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"
    assert {"text_encoder", "text_encoder_2"} < own.keys() and len(PUBLISHED["sdxl-base-1.0"].revision) == 40


def test_a_method_that_is_not_defined_says_why_and_what_to_do(xl):
    with pytest.raises(
        InputError, match=r"DreamBooth is not defined on Stable Diffusion XL: .*; take another method, or"
    ):
        Case("dreambooth", "xl", (("train_text_encoder", True),)).make(xl, Concept("v", "<v>", "dog"))


def test_what_was_learned_for_another_family_is_not_filled_in(xl, concept, tmp_path):
    """A Stable Diffusion 1 embedding, 32 wide as the first encoder's."""
    other: Any = Case("textual_inversion", "linear")
    method = disturbed(other.make(other.base(), concept))
    method.export(other.base(), tmp_path)
    with pytest.raises(InputError, match="of Stable Diffusion XL an embedding is a pair"):
        type(method).imported(method.config, xl, concept, tmp_path)
