"""MaSC on a tiny SigLIP 2 NaFlex: against the network's own masked pooling and arithmetic in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.metrics import features, masc, scoring, tables
from personalize_core.workspace.encoder_settings import Encoders as Settings

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
RED, BLUE = (250, 5, 5), (5, 5, 250)


class Redness:
    """A segmenter that shows what is red."""

    name, weights_hash, preprocessing = "redness", "0" * 64, "red above 200"

    def masks(self, images, class_noun):
        return [np.asarray(image.convert("RGB"))[..., 0] > 200 for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import Siglip2Config, Siglip2Model, Siglip2Tokenizer
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    path = tmp_path_factory.mktemp("naflex")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = tower | {"vocab_size": len(WORDS), "max_position_embeddings": 24, "projection_size": 32}
    torch.manual_seed(0)
    model: Any = Siglip2Model(
        Siglip2Config(text_config=text, vision_config=tower | {"num_patches": 256, "patch_size": 16})
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    Siglip2Tokenizer(vocab={word: number for number, word in enumerate(WORDS)}, merges=[]).save_pretrained(path)
    Siglip2ImageProcessorPil(max_num_patches=256).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def network(folder) -> masc.NaFlex:
    return masc.load_masc(str(folder))


def scene(rng: np.random.Generator, width: int, height: int, red: tuple[int, int, int, int] | None) -> Image.Image:
    """Blue noise, with a red box (left, top, right, bottom) that stands for the concept."""
    pixels = np.tile(np.array(BLUE, np.uint8), (height, width, 1))
    pixels[..., 1] = rng.integers(0, 256, (height, width))
    if red:
        left, top, right, bottom = red
        pixels[top:bottom, left:right, 0] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Of unlike shapes: the network pads the shorter rows of a batch."""
    rng = np.random.default_rng(0)
    return [scene(rng, 90, 60, (0, 0, 45, 60)), scene(rng, 64, 64, (16, 16, 64, 64)), scene(rng, 50, 121, None)]


def test_patches_and_the_background_are_the_networks_own_with_the_foreground_masked(network, scenes):
    """The independent way: one image at a time, and a key padding mask in torch's attention."""
    shown = Redness().masks(scenes, "dog")
    found = network.images(scenes, shown)
    tower, head = network.model.vision_model, network.model.vision_model.head
    for image, mask, patches in zip(scenes, shown, found, strict=True):
        given = network.processor([image], max_num_patches=1024, return_tensors="pt")
        high, wide = given["spatial_shapes"][0].tolist()
        with torch.no_grad():
            out = tower(**given)
            assert given["pixel_attention_mask"].sum() == high * wide
            torch.testing.assert_close(patches.tokens, out.last_hidden_state[0, : high * wide], atol=1e-5, rtol=0)
            hidden = np.ones(out.last_hidden_state.shape[1], bool)
            hidden[: high * wide] = (naive_shares(mask, high, wide) >= 0.5).reshape(-1)
            pooled = head.attention(
                head.probe, out.last_hidden_state, out.last_hidden_state, key_padding_mask=torch.tensor(hidden)[None]
            )[0]
            pooled = (pooled + head.mlp(head.layernorm(pooled)))[0, 0]
        assert np.array_equal(patches.foreground.numpy(), (naive_shares(mask, high, wide) > 0.5).reshape(-1))
        assert patches.background is not None
        torch.testing.assert_close(patches.background, pooled, atol=1e-5, rtol=1e-5)
    assert found[0].foreground.any() and not found[0].foreground.all() and not found[2].foreground.any()


def naive_shares(mask: np.ndarray, high: int, wide: int) -> np.ndarray:
    """(high, wide): the mask's bilinear value at each patch's centre, in plain loops."""
    found = np.zeros((high, wide))
    rows, columns = mask.shape
    for row in range(high):
        for column in range(wide):
            y = min(max((row + 0.5) * rows / high - 0.5, 0), rows - 1)
            x = min(max((column + 0.5) * columns / wide - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            dy, dx = y - top, x - left
            value = (mask[top, left] * (1 - dx) + mask[top, right] * dx) * (1 - dy)
            value += (mask[bottom, left] * (1 - dx) + mask[bottom, right] * dx) * dy
            found[row, column] = value
    return found


def test_concept_preservation_is_the_mean_best_cosine_of_the_foreground():
    rng = np.random.default_rng(1)
    reference, image = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    shown = np.array([True, False, True, True, False, False, True])
    best = []
    for row in reference[shown]:
        best.append(max(row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in image))
    expected = float(np.mean(best))
    one = masc.Patches(torch.tensor(reference), torch.tensor(shown), None, 0.5)
    other = masc.Patches(torch.tensor(image), torch.zeros(9, dtype=torch.bool), None, 0.0)
    assert masc.concept_preservation(one, other) == pytest.approx(expected, abs=1e-12)
    assert masc.concept_preservation(one, one) == pytest.approx(1)
    with pytest.raises(ValueError, match="no patch"):
        masc.concept_preservation(other, one)


@pytest.mark.parametrize(
    ("prompt", "noun", "expected"),
    [
        ("A photo of a kitten chasing a butterfly", "kitten", "A photo of chasing a butterfly"),
        ("The Dog on the beach", "dog", "on the beach"),
        ("dog, in snow", "dog", ", in snow"),
        ("a hot-dog and a dog", "dog", "a hot-dog and"),
        ("a mug (old) there", "mug (old", ") there"),
        ("a dog", "dog", ""),
    ],
)
def test_the_subject_leaves_with_its_article(prompt, noun, expected):
    assert masc.without_subject(prompt, noun) == expected


TEMPLATES = ["a photo of a {}", "{}"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, scenes) -> Path:
    root, rng = tmp_path_factory.mktemp("workspace"), np.random.default_rng(2)
    (root / "dog").mkdir()
    for index, box in enumerate([(0, 0, 40, 64), (20, 10, 64, 60)]):
        scene(rng, 64, 64, box).save(root / "dog" / f"{index}.png")
    grid = root / "grid"
    (grid / "plain").mkdir(parents=True)
    images = [scenes[0], scenes[2], scene(rng, 64, 64, (0, 0, 64, 64)), scenes[1]]
    for number, image in enumerate(images):
        image.save(grid / "plain" / f"{number // 2:02d}_{number % 2:02d}.png")
    about = {"base_model": "mini", "concept": "dog", "class_noun": "dog", "method": "vico", "variants": ["plain"]}
    about |= {"templates": TEMPLATES, "images_per_prompt": 2}
    (grid / "grid.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def measured(network) -> features.Encoders:
    segmenter: Any = Redness()
    return features.Encoders([], [], segmenter, [], network)


def test_a_grid_has_both_scores_and_says_what_is_absent(workspace, measured, network):
    concept, images = Concept("dog", "<dog>", "dog"), sorted((workspace / "dog").glob("*.png"))
    found = scoring.score_grid(workspace, workspace / "grid", concept, images, measured)
    table = found.table
    likeness = table.filter(metric="masc_cp").sort("prompt_index", "image_index")
    grid = [Image.open(path) for path in sorted((workspace / "grid" / "plain").glob("*.png"))]
    opened = [Image.open(path) for path in images]
    references, looks = (network.images(some, Redness().masks(some, "dog")) for some in (opened, grid))
    expected = [np.mean([masc.concept_preservation(one, look) for one in references]) for look in looks]
    assert likeness["score"].to_list() == pytest.approx(expected, abs=1e-6)
    assert likeness["pairs"].to_list() == [2] * 4 and likeness["headline"].all()
    assert likeness["foreground"].to_list()[:3] == pytest.approx([0.5, 0.0, 1.0])
    assert "redness" in likeness["mask"][0] and "more than 0.5" in likeness["mask"][0]
    following = table.filter(metric="masc_pf").sort("image_index")
    assert following["text"].to_list() == ["a photo of"] * 2
    text = network.texts(["a photo of"])[0]
    backgrounds = [look.background for look in looks[:2]]
    expected = [float(one @ text / one.norm() / text.norm()) for one in backgrounds if one is not None]
    assert following["score"].to_list() == pytest.approx(expected, abs=1e-6)
    assert following["text_variant"].unique().to_list() == [tables.SUBJECT_DELETED]
    reasons = {one["image"]: one["reason"] for one in found.absent if one["metric"] == "masc_pf"}
    assert reasons == dict.fromkeys(["grid/plain/01_00.png", "grid/plain/01_01.png"], "its prompt leaves no text")


def test_an_image_that_is_all_concept_has_no_background(network):
    everything = network.images([Image.new("RGB", (64, 64), RED)], [np.ones((64, 64), bool)])[0]
    assert everything.background is None and everything.foreground.all()


def test_concept_images_are_compared_with_their_others_and_one_alone_with_none(workspace, measured):
    concept, images = Concept("dog", "<dog>", "dog"), sorted((workspace / "dog").glob("*.png"))
    found = scoring.score_references(workspace, concept, images, measured)
    assert found.table["metric"].to_list() == ["masc_cp"] * 2
    assert (found.table["score"] < 1 - 1e-6).all() and found.table["pairs"].to_list() == [1, 1]
    alone = scoring.score_references(workspace, concept, images[:1], measured)
    assert [(one["metric"], one["reason"]) for one in alone.absent] == [("masc_cp", scoring.ALONE)]


def test_a_concept_image_without_the_concept_leaves_likeness_absent(workspace, measured, tmp_path):
    concept = Concept("dog", "<dog>", "dog")
    Image.new("RGB", (64, 64), BLUE).save(tmp_path / "empty.png")
    found = scoring.score_grid(workspace, workspace / "grid", concept, [tmp_path / "empty.png"], measured)
    assert set(found.table["metric"]) == {"masc_pf"}
    (why,) = [one["reason"] for one in found.absent if one["metric"] == "masc_cp"]
    assert "no patch of the concept image empty.png shows its dog" in why


def test_settings_want_a_segmenter_beside_it():
    with pytest.raises(ValueError, match="masc needs masks"):
        Settings(text_image=["mini-clip"], identity=["mini-identity"], masc="siglip2-so400m-naflex")


def test_an_unknown_name_and_another_networks_folder_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no encoder 'siglip3': known are siglip2-so400m-naflex"):
        masc.load_masc("siglip3")
    with pytest.raises(InputError, match="is not siglip2-so400m-naflex: its features have width 32, not 1152"):
        masc.load_masc(f"siglip2-so400m-naflex:{folder}")
