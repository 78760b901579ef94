"""Foreground masks: where they come from, what they do to an image, and when masked scores are absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.concepts.masks import own_masks
from personalize_core.errors import InputError
from personalize_core.metrics import features, masks, scoring, summaries, tables
from personalize_core.metrics.encoder_names import MINI_WEIGHTS
from personalize_core.mini import concepts, places, segmenter, world

torch.set_num_threads(1)
ROOT = Path(masks.__file__).parents[2]
DOG = Concept("rex", "<rex>", "dog")


@dataclass(frozen=True)
class MeanColour:
    """An encoder whose feature is the mean colour, and a one that keeps grey from having no direction."""

    name: str = "mean-colour"
    weights_hash: str = "0" * 64
    preprocessing: str = "none"
    broken: bool = False
    looks_for = None

    def images(self, images):
        rows = torch.stack([torch.tensor(np.asarray(p, dtype=np.float32).mean((0, 1)) / 255) for p in images])
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        return torch.where(rows[:, :1] > 0.9, torch.nan, rows) if self.broken else rows

    def texts(self, texts):
        return torch.ones(len(texts), 4)


@dataclass(frozen=True)
class NotWhite:
    """A segmenter that takes all that is not white for the concept."""

    name: str = "not-white"
    weights_hash: str = "1" * 64
    preprocessing: str = "none"

    def masks(self, images, class_noun):
        return [np.asarray(image).min(axis=2) < 250 for image in images]


def encoders(**changes) -> Any:
    made = {"text_image": [MeanColour()], "identity": [MeanColour(**changes)], "segmenter": NotWhite()}
    return features.Encoders(**made)


def blot(share: float, colour: str = "red", size: int = 100) -> Image.Image:
    """White, with the upper rows in a colour."""
    image = Image.new("RGB", (size, size), "white")
    image.paste(colour, (0, 0, size, round(share * size)))
    return image


@pytest.fixture
def workspace(tmp_path) -> Path:
    """Two concept images, and a grid of three images: half red, all white, all red."""
    concept_images, grid = tmp_path / "rex", tmp_path / "grid" / "plain"
    concept_images.mkdir()
    grid.mkdir(parents=True)
    for name, share in (("a", 0.5), ("b", 0.6)):
        blot(share).save(concept_images / f"{name}.png")
    for image, share in enumerate((0.5, 0.0, 1.0)):
        blot(share).save(grid / f"00_{image:02d}.png")
    about = {"base_model": "mini", "concept": "rex", "class_noun": "dog", "method": "vico", "variants": ["plain"]}
    (grid.parent / "grid.json").write_text(json.dumps({**about, "templates": ["a {}"], "images_per_prompt": 3}))
    return tmp_path


def scored(workspace: Path, made: Any = None) -> scoring.Scored:
    concept_images = sorted((workspace / "rex").glob("*.png"))
    return scoring.score_grid(workspace, workspace / "grid", DOG, concept_images, made or encoders())


# -- what a mask does ------------------------------------------------------------------------------------------


def test_a_composite_is_the_image_where_the_mask_is_and_mid_grey_elsewhere():
    image, mask = blot(0.7), np.zeros((100, 100), bool)
    mask[:30, 20:] = True
    pixels = np.asarray(masks.composite(image, mask))
    assert pixels.shape == (100, 100, 3)  # no crop
    assert (pixels[mask] == np.asarray(image)[mask]).all() and (pixels[~mask] == 128).all()


@pytest.mark.parametrize(("pixels", "grey"), [(99, True), (100, False)])
def test_a_mask_of_less_than_a_hundredth_is_empty_and_leaves_a_grey_image(pixels, grey):
    mask = np.zeros(10_000, bool)
    mask[:pixels] = True
    shown = np.asarray(masks.composite(blot(1.0), mask.reshape(100, 100)))
    assert (shown == 128).all() == grey


def test_a_image_without_the_concept_is_scored_counted_and_not_left_out(workspace):
    table = scored(workspace).table.filter(metric="dino_masked").sort("image_index")
    assert table["foreground"].to_list() == [0.5, 0.0, 1.0]
    grey, whole = torch.tensor([128.0] * 3) / 255, torch.tensor([1.0, 0, 0])
    concept_images = [torch.cat([s * whole + (1 - s) * grey, torch.ones(1)]) for s in (0.5, 0.6)]
    empty = torch.cat([grey, torch.ones(1)])
    expected = np.mean([float(torch.cosine_similarity(empty, one, dim=0)) for one in concept_images])
    assert table["score"][1] == pytest.approx(expected, abs=1e-6)
    summary = summaries.summarise(scored(workspace).table, draws=100).filter(metric="dino_masked")
    assert summary["n_empty"].to_list() == [1, 1] and summary["images"].to_list() == [3, 3]


def test_every_masked_row_names_the_mask_rule_and_no_other_does(workspace):
    table = scored(workspace).table
    rules = {(row["metric"].endswith("_masked"), row["mask"]) for row in table.iter_rows(named=True)}
    assert rules == {(False, "none"), (True, masks.rule(NotWhite()))}
    assert "not-white" in masks.rule(NotWhite()) and "1" * 64 in masks.rule(NotWhite())


# -- scores that cannot be computed ----------------------------------------------------------------------------


def test_a_concept_image_without_the_concept_leaves_masked_scores_out_and_says_why(workspace):
    blot(0.0).save(workspace / "rex" / "c.png")
    found = scored(workspace)
    assert set(found.table["metric"]) & {"clip_i", "dino", "clip_i_masked", "dino_masked"} == {"clip_i", "dino"}
    reasons = {one["metric"]: one["reason"] for one in found.absent}
    assert set(reasons) == {"clip_i_masked", "dino_masked"}
    assert "c.png not-white finds no dog; put better masks beside" in reasons["dino_masked"]


def test_features_that_are_no_numbers_leave_a_image_out_and_say_why(workspace):
    found = scored(workspace, encoders(broken=True))  # red alone, and white, are as red as can be
    absent = [one for one in found.absent if one["metric"] == "dino"]
    assert {one["reason"] for one in absent} == {"its features of a concept image are zero or not finite"}
    for name in ("a", "b"):
        blot(1.0, "blue").save(workspace / "rex" / f"{name}.png")
    found = scored(workspace, encoders(broken=True))
    absent = [one for one in found.absent if one["metric"] == "dino"]
    assert [one["image"] for one in absent] == [f"grid/plain/00_{image:02d}.png" for image in range(3)]
    assert "dino" not in set(found.table["metric"]) and found.table["score"].is_finite().all()


def test_a_prompt_that_is_only_the_slot_has_no_score_with_the_slot_deleted(workspace):
    about = json.loads((workspace / "grid" / "grid.json").read_text()) | {"templates": ["{}"]}
    (workspace / "grid" / "grid.json").write_text(json.dumps(about))
    found = scored(workspace)
    assert {one["metric"] for one in found.absent} == {"clip_t_slot_deleted", "clip_t_slot_deleted_scaled"}
    assert {one["reason"] for one in found.absent} == {"its prompt leaves no text"} and len(found.absent) == 6
    assert len(found.table.filter(metric="clip_t")) == 3


def test_one_concept_image_alone_has_no_ceiling_and_says_why(workspace):
    found = scoring.score_references(workspace, DOG, [workspace / "rex" / "a.png"], encoders())
    assert found.table.is_empty()
    assert {one["metric"] for one in found.absent} == {"clip_i", "clip_i_masked", "dino", "dino_masked"}
    assert {one["reason"] for one in found.absent} == {"there is one concept image, and none to compare it with"}


def test_a_image_that_is_missing_from_its_grid_is_named(workspace):
    (workspace / "grid" / "plain" / "00_01.png").unlink()
    with pytest.raises(InputError, match=r"00_01.png is missing from its grid \(1 of 3\); sample the grid again"):
        scored(workspace)


# -- masks that came with the concept --------------------------------------------------------------------------


def test_masks_that_came_with_the_concept_images_are_taken_before_the_segmenter(workspace):
    (workspace / "rex" / "masks").mkdir()
    for name in ("a", "b"):
        Image.new("L", (100, 100), 255).save(workspace / "rex" / "masks" / f"{name}.png")
    found = scoring.score_references(workspace, DOG, sorted((workspace / "rex").glob("*.png")), encoders())
    assert found.table.filter(metric="dino_masked")["foreground"].to_list() == [1.0, 1.0]


def test_the_demo_concepts_have_a_mask_for_each_concept_image():
    for folder in sorted((ROOT / "data" / "concepts").glob("*1")):
        found = own_masks(sorted(folder.glob("*.png")))
        assert found is not None and len(found) == 5
        assert all(0.1 < masks.share(mask) < 0.7 for mask in found)


def test_masks_for_some_concept_images_alone_are_refused(workspace):
    (workspace / "rex" / "masks").mkdir()
    blot(0.5).save(workspace / "rex" / "masks" / "a.png")
    with pytest.raises(
        InputError, match=r"masks lacks b.png; put a mask there for each concept image, or take them all out"
    ):
        scored(workspace)


def test_a_mask_of_another_size_is_refused(workspace):
    (workspace / "rex" / "masks").mkdir()
    for name, size in (("a", 100), ("b", 64)):
        blot(0.5, size=size).save(workspace / "rex" / "masks" / f"{name}.png")
    with pytest.raises(InputError, match=r"b.png has 64 x 64 pixels and b.png 100 x 100; make the mask as large"):
        scored(workspace)


# -- the mini world's segmenter --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return masks.load_segmenter("mini-segmenter")


def test_the_mini_segmenter_finds_the_demo_concepts_in_their_concept_images(mini):
    overlaps = []
    for folder in sorted((ROOT / "data" / "concepts").glob("*1")):
        concept_images = sorted(folder.glob("*.png"))
        found = np.stack(mini.masks([Image.open(path).convert("RGB") for path in concept_images], "thing"))
        overlaps.append(segmenter.overlap(found, np.stack(own_masks(concept_images) or [])).mean())
    assert len(overlaps) == len(concepts.DESIGNS) and min(overlaps) > 0.8, overlaps


def test_the_mini_segmenter_finds_nothing_where_there_is_nothing(mini):
    rng = np.random.default_rng(5)
    empty = [Image.fromarray((places.draw("", rng) * 255).astype(np.uint8)) for _ in range(10)]
    assert sum(masks.share(mask) < tables.EMPTY for mask in mini.masks(empty, "dog")) >= 9


def test_a_mask_is_as_large_as_its_image_and_does_not_depend_on_the_batch(mini):
    image = Image.fromarray(world.draw(world.random_scene(np.random.default_rng(2)))[0])
    wide = image.resize((150, 90))
    together = mini.masks([image, wide, image], "dog")
    assert [mask.shape for mask in together] == [(64, 64), (90, 150), (64, 64)]
    assert (together[1] == mini.masks([wide], "dog")[0]).all()


def test_training_asks_an_empty_scene_for_an_empty_mask_and_a_whole_one_for_a_whole():
    empty, whole = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    sure = torch.full((1, 4, 4), 9.0)
    assert segmenter.loss_of(-sure, empty) < 0.01 < segmenter.loss_of(sure, empty)
    assert segmenter.loss_of(sure, whole) < 0.01 < segmenter.loss_of(-sure, whole)


def test_a_moved_scene_and_its_mask_stay_together():
    masked = np.zeros((8, 64, 64), bool)
    masked[:, 20:40, 10:30] = True
    images = np.repeat(masked[..., None], 3, axis=3).astype(np.uint8)
    shown, moved = segmenter.moved(images, masked, np.random.default_rng(0))
    assert (shown[..., 0] == moved).all() and not (moved == masked).all()


def test_overlap_is_intersection_over_union_and_one_where_both_are_empty():
    one, other = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    one[0, 0], other[0, :, 0] = True, True
    assert segmenter.overlap(one, other).tolist() == pytest.approx([1 / 3, 1.0])


# -- CLIPSeg ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clipseg_folder(tmp_path_factory) -> Path:
    """A CLIPSeg with the files of the published one, tiny and random."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, ViTImageProcessor

    folder = tmp_path_factory.mktemp("clipseg")
    shutil.copytree(MINI_WEIGHTS / "base" / "tokenizer", folder, dirs_exist_ok=True)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = small | {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=text,
        vision_config=small | {"image_size": 32, "patch_size": 16},  # the decoder is made for patches of 16
        projection_dim=32,
        reduce_dim=16,
        extract_layers=[1, 2, 3],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_complex_transposed_convolution=True,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    size = {"height": 48, "width": 48}  # not the vision tower's: the published one is fed with 352, and made for 224
    about: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
    ViTImageProcessor(size=size, **about).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("given", ["{}", "clipseg:{}"])
def test_clipseg_is_the_librarys_own_mask_for_the_class_noun(given, clipseg_folder):
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((48, 48), (60, 90))]
    ours = masks.load_segmenter(given.format(clipseg_folder))
    model: Any = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).eval()
    words = AutoTokenizer.from_pretrained(clipseg_folder)(["red mug"], return_tensors="pt")
    found = {noun: ours.masks(images, noun) for noun in ("red mug", "dog")}
    mean, std = (np.array(one, np.float32) for one in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for image, mask in zip(images, found["red mug"], strict=True):
        resized = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR), np.float32) / 255
        with torch.no_grad():
            pixels = torch.from_numpy(((resized - mean) / std).transpose(2, 0, 1)[None])
            logits = model(pixel_values=pixels, **words).logits.view(1, 1, 48, 48)
        expected = torch.nn.functional.interpolate(logits, size=mask.shape, mode="bilinear")[0, 0] > 0
        assert (mask == expected.numpy()).mean() > 0.999 and 0 < mask.mean() < 1
    assert any((a != b).any() for a, b in zip(found["red mug"], found["dog"], strict=True))  # it reads the noun
    assert ours.name == ("clipseg" if ":" in given else clipseg_folder.name) and "48" in ours.preprocessing


def test_a_segmenter_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(InputError, match="there is no segmenter 'sam': known are mini-segmenter and clipseg"):
        masks.load_segmenter("sam")
    with pytest.raises(InputError, match="no weights for the encoder .* does not hold config.json"):
        masks.load_segmenter(str(tmp_path))


# -- encoders --------------------------------------------------------------------------------------------------


def test_two_encoders_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "load_text_image_encoder", lambda name, device: MeanColour())
    with pytest.raises(InputError, match="a/clip and b/clip both go by the name 'mean-colour'"):
        features.load_encoders(["a/clip", "b/clip"], [], None, ["class_phrase"], "cpu")
