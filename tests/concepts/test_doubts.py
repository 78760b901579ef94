"""What can be used and is most likely a mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize_core.concepts.doubts import doubts


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, each with a mask of its middle."""
    (tmp_path / "masks").mkdir()
    for number in range(3):
        noise(number).save(tmp_path / f"{number}.png")
        mask = Image.new("L", (40, 30))
        mask.paste(255, (10, 10, 30, 20))
        mask.save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def test_of_usual_images_nothing_is_said(folder):
    assert doubts(folder) == []


@pytest.mark.parametrize("value", [0, 100])  # of 255; what is at most 127 is not the concept
def test_a_mask_without_the_concept_is_named(folder, value):
    Image.new("L", (40, 30), value).save(folder / "masks" / "1.png")
    assert doubts(folder) == ["the mask of 1.png is black all over, so it shows no concept"]


@pytest.mark.parametrize(("colour", "name"), [("black", "1.png"), ((200, 30, 90), "1.png"), ((200, 30, 90), "3.jpg")])
def test_an_image_of_one_colour_is_named(folder, colour, name):
    if name.endswith("jpg"):
        Image.open(folder / "masks" / "1.png").save(folder / "masks" / "3.png")
    Image.new("RGB", (40, 30), colour).save(folder / name)
    assert doubts(folder) == [f"{name} is of one colour"]


def test_a_grey_image_of_many_brightnesses_is_none_of_one_colour(folder):
    noise(7).convert("L").save(folder / "1.png")
    assert doubts(folder) == []


def test_the_same_photograph_under_two_names_is_named_whatever_its_format(folder):
    noise(0).save(folder / "0_again.bmp")
    Image.open(folder / "masks" / "0.png").save(folder / "masks" / "0_again.png")
    assert doubts(folder) == ["0.png and 0_again.bmp are the same image"]
