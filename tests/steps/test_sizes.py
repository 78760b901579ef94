"""Latents for a base model that is told of image sizes know those of every view, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.files.atomic import read_json
from personalize_core.steps.events import unheard
from personalize_core.steps.latents import encode
from tests.conftest import tiny_base, tiny_xl


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """A wide image, and one that was photographed with the camera on its side: 20 wide and 40 high when upright."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[:, :40]).save(tmp_path / "turned.jpg", exif=exif)
    return [tmp_path / "wide.png", tmp_path / "turned.jpg"]


def test_of_each_view_there_are_its_original_size_its_crop_and_the_image_size(paths, tmp_path):
    wide_crops = [[20, 60, 0, left, 16, 16] for left in (0, 8, 16, 24, 32)]
    upright_crops = [[40, 20, top, 0, 16, 16] for top in (0, 4, 8, 12, 16)]
    crop, centre = (Preprocessing(geometry, "bilinear", flip=False) for geometry in ("crop", "centre"))
    for recipe, expected in (
        (crop, [wide_crops, upright_crops]),
        (centre, [[[20, 60, 0, 16, 16, 16]], [[40, 20, 8, 0, 16, 16]]]),
    ):
        encode(tiny_xl(), paths, recipe, tmp_path, "encoding", unheard)
        assert read_json(tmp_path / "sizes.json") == expected


def test_for_stable_diffusion_1_latents_are_stored_as_before(paths, tmp_path):
    (tmp_path / "made").mkdir()
    encode(tiny_base(), paths, Preprocessing("crop", "bilinear", flip=False), tmp_path / "made", "encoding", unheard)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["moments.safetensors"]
