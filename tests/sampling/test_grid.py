"""A grid's folder holds the images that its description names, and is refused where it has none."""

from __future__ import annotations

import json
import shutil

import pytest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.sampling.grid import DESCRIPTION, IMAGE, images_in, read_grid
from personalize_core.steps import result_checks
from tests import tiny_workspace

ABOUT = {
    "variants": ["plain", "lag"],
    "templates": ["a photo of a {}", "a {} on the beach", "a {} at night"],
    "images_per_prompt": 2,
    "base_model": "mini",
    "concept": "rex",
    "method": "dreambooth",
}


def test_every_image_has_a_place_of_its_own_in_the_order_of_variant_prompt_and_image():
    found = images_in(ABOUT)
    assert len(found) == 12 and len(set(found.values())) == 12
    assert list(found)[:3] == ["plain/00_00.png", "plain/00_01.png", "plain/01_00.png"]
    assert found["lag/02_01.png"] == ("lag", 2, 1)


def test_a_image_tells_its_prompt_and_image_by_its_name_beyond_a_hundred_too():
    for name, (_, prompt, image) in images_in(ABOUT | {"templates": ["{}"] * 101}).items():
        place = IMAGE.fullmatch(name.partition("/")[2])
        assert place and (int(place["prompt"]), int(place["image"])) == (prompt, image)


DAMAGED = [None, '{"variants":', "[]", json.dumps({key: ABOUT[key] for key in ABOUT if key != "templates"})]


@pytest.mark.parametrize("written", DAMAGED)
def test_a_description_that_is_gone_or_damaged_is_refused_with_what_to_do(written, tmp_path):
    if written is not None:
        (tmp_path / DESCRIPTION).write_text(written)
    with pytest.raises(InputError, match="grid.json.* is missing or damaged; `personalize evaluate` samples"):
        read_grid(tmp_path)


def test_a_grid_without_its_description_is_not_scored_and_passes_no_gate(tmp_path):
    store = tiny_workspace.finished(tmp_path, ["rex"], ["base_model"])
    (store.grid("base_model", "rex") / DESCRIPTION).unlink()
    shutil.rmtree(store.scores("base_model", "rex"))
    with pytest.raises(InputError, match="grid.json changed since .*; run .*evaluate rex -m base_model"):
        steps.score(store, "rex", "base_model")
    with pytest.raises(InputError, match="`personalize evaluate` samples the grid again"):
        result_checks.grid(store, "rex", "base_model")
    steps.sample_grid(store, "rex", "base_model")
    assert all(gate.passed for gate in result_checks.grid(store, "rex", "base_model"))
