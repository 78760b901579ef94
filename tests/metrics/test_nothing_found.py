"""An encoder that looks for something, such as a face, and images in which there is none: tables, and side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.metrics import features, scoring, similarity
from personalize_core.metrics.several_concepts import identity_of_parts
from tests.metrics.counting_encoder import Counting

ANN = Concept("ann", "<ann>", "person")
BARE = "white"


@dataclass(frozen=True)
class Painted:
    """Its feature is the mean colour; in white it finds nothing, as faces.Faces finds no face."""

    name: str = "painted"
    weights_hash: str = "0" * 64
    preprocessing: str = "none"
    looks_for: str | None = "face"

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        means = torch.tensor(np.stack([np.asarray(image.convert("RGB")).mean((0, 1)) for image in images]))
        bare = (means == 255).all(dim=1, keepdim=True)
        return F.normalize(means.masked_fill(bare, 0).float(), dim=1)


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def save(folder: Path, colours: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{place}.png" for place in range(len(colours))]
    for path, colour in zip(paths, colours, strict=True):
        plain(colour).save(path)
    return paths


def measured(encoder: Painted | None = None) -> features.Encoders:
    return features.Encoders([Counting()], [encoder or Painted()], None, ())


def scored(root: Path, sampled: Sequence[str], known: Sequence[str], encoder: Painted | None = None) -> scoring.Scored:
    paths = save(root / "grid" / "plain", sampled)
    for image, path in enumerate(paths):
        path.rename(path.with_name(f"00_{image:02d}.png"))
    about = {"base_model": "mini", "concept": "ann", "class_noun": "person", "method": "oft", "variants": ["plain"]}
    about |= {"templates": ["a {}"], "images_per_prompt": len(sampled)}
    (root / "grid" / "grid.json").write_text(json.dumps(about))
    return scoring.score_grid(root, root / "grid", ANN, save(root / "ann", known), measured(encoder))


def scores(found: scoring.Scored) -> list[float]:
    return found.table.filter(metric="dino").sort("image_index")["score"].to_list()


def test_an_image_in_which_nothing_is_found_has_zero_so_that_the_one_that_shows_it_is_not_judged_alone(tmp_path):
    found = scored(tmp_path, [BARE, "red", BARE, BARE], ["red", "red"])
    assert scores(found) == pytest.approx([0, 1, 0, 0]) and found.absent == []


def test_where_none_of_the_images_shows_it_all_have_zero(tmp_path):
    assert scores(scored(tmp_path, [BARE, BARE], ["red", "red"])) == [0, 0]


def test_a_concept_image_in_which_nothing_is_found_is_left_out_of_what_images_are_compared_with_and_named(tmp_path):
    found = scored(tmp_path, ["red", BARE], ["red", BARE, "red"])
    assert scores(found) == pytest.approx([1, 0])
    assert set(found.table.filter(metric="dino")["pairs"]) == {2}
    assert found.absent == [
        {
            "metric": "dino",
            "encoder": "painted",
            "image": "1.png",
            "reason": "no face is found in this concept image, so no image is compared with it",
        }
    ]


def test_if_no_concept_image_shows_it_there_is_nothing_to_compare_with_and_that_is_said(tmp_path):
    found = scored(tmp_path, ["red"], [BARE, BARE])
    assert scores(found) == []
    assert [one["reason"] for one in found.absent] == ["a face is found in 0 of 2 concept images; it takes 1"]


def test_zeros_of_an_encoder_that_looks_for_nothing_are_still_a_fault(tmp_path):
    found = scored(tmp_path, [BARE, "red"], ["red"], Painted(looks_for=None))
    assert scores(found) == pytest.approx([1])
    assert [one["reason"] for one in found.absent] == ["its features are zero or not finite"]


def test_among_each_other_concept_images_are_compared_but_for_those_without(tmp_path):
    paths = save(tmp_path / "ann", ["red", BARE, "yellow"])
    found = scoring.score_references(tmp_path, ANN, paths, measured())
    table = found.table.filter(metric="dino").sort("image_index")
    assert table["image_index"].to_list() == [0, 2] and set(table["pairs"]) == {1}
    assert table["score"].to_list() == pytest.approx([np.cos(np.pi / 4)] * 2)  # of red (1, 0, 0) and yellow (1, 1, 0)
    assert [(one["metric"], one["image"]) for one in found.absent] == [("dino", "ann/1.png")]


def test_one_concept_image_that_shows_it_has_none_to_be_compared_with(tmp_path):
    found = scoring.score_references(tmp_path, ANN, save(tmp_path / "ann", ["red", BARE]), measured())
    assert "dino" not in set(found.table["metric"])
    assert [one["reason"] for one in found.absent] == ["a face is found in 1 of 2 concept images; it takes 2"]


def test_held_out_images_without_are_left_out_of_both_sides(tmp_path):
    trained, held_out = save(tmp_path / "ann", ["red", BARE]), save(tmp_path / "out", [BARE, "red"])
    found = scoring.score_references(tmp_path, ANN, trained, measured(), held_out)
    rows = found.table.filter(encoder="painted").select("image", "score", "pairs").rows()
    assert sorted(rows) == [("ann/0.png", pytest.approx(1), 1), ("out/1.png", pytest.approx(1), 1)]


def test_parts_of_an_image_without_a_face_are_unlike_every_concept():
    both = Image.new("RGB", (32, 16), BARE)
    both.paste("red", (16, 0, 32, 16))
    alike = identity_of_parts([both], [[plain("red"), plain(BARE)], [plain("red")]], Painted())
    torch.testing.assert_close(alike, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]).double())
    with pytest.raises(InputError, match="no face is found in any of the 1 concept images"):
        identity_of_parts([both], [[plain("red")], [plain(BARE)]], Painted())


def test_drift_is_one_where_a_face_came_or_went_and_nothing_where_there_was_none():
    red, bare = torch.tensor([[2.0, 0, 0]]), torch.zeros(1, 3)
    pairs = [(red, red), (bare, bare), (red, bare), (bare, red), (red, -red)]
    after, before = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert similarity.drift_per_image(after, before, "face").tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="row 1 of the image features is zero"):
        similarity.drift_per_image(red.repeat(2, 1) * torch.tensor([[1.0], [0]]), red.repeat(2, 1))
