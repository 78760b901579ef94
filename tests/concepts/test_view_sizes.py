"""What Stable Diffusion XL is told of a training image: its concept image's size, and what was cut off in making it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

from personalize_core.concepts.images import ConceptLatents, sized_views_of, views_of, zooms
from personalize_core.concepts.preprocessing import Preprocessing

SHAPES = [(40, 40), (90, 36), (36, 91), (101, 75)]


def ramp(width: int, height: int) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down: in 255ths of the image."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8))


def told(geometry: Any, image: Image.Image, size: int, flip: bool = True) -> list[list[int]]:
    return [view.sizes for view in sized_views_of(Preprocessing(geometry, "bilinear", flip), image, size)]


# Original height and width, top and left of the crop, target height and width.


def test_a_squashed_image_is_a_whole_one_of_another_size():
    assert told("squash", ramp(64, 20), 16) == [[20, 64, 0, 0, 16, 16]] * 2


def test_a_middle_square_was_cut_at_both_ends():
    """Of 65 pixels beside 32 remain 16 on the left and 17 on the right, which a mirror swaps."""
    assert told("centre", ramp(65, 32), 32) == [[32, 65, 0, 16, 32, 32], [32, 65, 0, 17, 32, 32]]
    assert told("centre", ramp(64, 32), 16) == [[32, 64, 0, 8, 16, 16]] * 2  # counted behind the resize
    assert told("centre", ramp(32, 64), 16) == [[64, 32, 8, 0, 16, 16]] * 2


def test_a_crop_says_how_far_it_is_from_the_top_left_of_the_resized_image():
    expected = [[32, 128, 0, left, 16, 16] for left in (0, 12, 24, 36, 48)]
    assert told("crop", ramp(128, 32), 16, flip=False) == expected
    assert told("crop", ramp(128, 32), 16) == expected + expected[::-1]  # from the mirrored image's left
    assert told("crop", ramp(8, 32), 16, flip=False) == [[32, 8, top, 0, 16, 16] for top in (0, 12, 24, 36, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_are_those_that_the_scripts_would_cut_there(shape):
    """Which resize, mirror, and then cut at the place that they tell."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    whole: Any = functional.resize(noise, [16], functional.InterpolationMode.BILINEAR)  # type: ignore[arg-type]
    views = sized_views_of(Preprocessing("crop", "bilinear", flip=True), noise, 16)
    for number, view in enumerate(views):
        height, width, top, left, *target = view.sizes
        flipped = functional.hflip(whole) if number >= len(views) / 2 else whole
        assert np.array_equal(np.asarray(functional.crop(flipped, top, left, 16, 16)), np.asarray(view.shown))
        assert (width, height) == shape and target == [16, 16]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_rotated_image_is_told_as_the_canvas_that_it_was_turned_on(shape):
    """Turned, resized, mirrored and cut by torchvision at the place that is told: by one angle it is the view."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    kind, angles = functional.InterpolationMode, [0.0, *(-45 + 90 * (k + 0.5) / 24 for k in range(24))]
    for view in sized_views_of(Preprocessing("rotate", "bilinear", flip=True), noise, 16):
        height, width, top, left, *target = view.sizes
        found = 0
        for angle in angles:
            canvas: Any = functional.rotate(noise, angle, kind.NEAREST, expand=True) if angle else noise  # type: ignore[arg-type]
            resized: Any = functional.resize(canvas, [16], kind.BILINEAR)
            for turned in (resized, functional.hflip(resized)):
                cut = np.asarray(functional.crop(turned, top, left, 16, 16))
                found += canvas.size == (width, height) and np.array_equal(cut, np.asarray(view.shown))
        assert found == 1 and target == [16, 16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_of_a_zoomed_image_is_told_what_was_cut_off_at_its_scale(flip, shape):
    """Read from the ramp: the first pixel that shows the image is as far inside it as was told."""
    size, (width, height) = 48, shape
    views = sized_views_of(Preprocessing("zoom", "bilinear", flip), ramp(*shape), size)
    kinds = set()
    for view, zoom in zip(views, zooms(size), strict=True):
        original_height, original_width, top, left, *target = view.sizes
        assert (original_width, original_height) == shape and target == [size, size]
        scale = (size if zoom.kind == "plain" else zoom.side) / min(shape)
        x, y = (zoom.left, zoom.top) if zoom.kind == "far" else (0, 0)
        shown = np.asarray(ImageOps.mirror(view.shown) if zoom.mirrored and flip else view.shown, dtype=float)
        if zoom.mirrored and flip:  # read it from the other end
            side = min(zoom.side, size) if zoom.kind == "far" else size
            x = size - x - side
            left = width * scale - left - side
        red, green, _ = shown[y + 2, x + 2]  # away from the edge, which a filter repeats
        one_pixel = 1.0  # of the training image
        assert red / 255 * width * scale - 2.5 == pytest.approx(left, abs=one_pixel)
        assert green / 255 * height * scale - 2.5 == pytest.approx(top, abs=one_pixel)
        kinds.add(zoom.kind)
    assert kinds == {"plain", "far", "near"}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("geometry", ["squash", "centre", "crop", "rotate", "zoom"])
def test_every_view_has_sizes_and_stays_as_it_was(geometry, flip):
    recipe = Preprocessing(geometry, "bicubic", flip)
    sized, plain = sized_views_of(recipe, ramp(90, 36), 16), views_of(recipe, ramp(90, 36), 16)
    assert [view.shown.tobytes() for view in sized] == [view.tobytes() for view in plain]
    assert all(min(view.sizes) >= 0 and len(view.sizes) == 6 for view in sized)


# -- latents ---------------------------------------------------------------------------------------------------


def numbered(images: int, views: int, start: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Moments without deviation, and sizes, that both say which image and view they are of."""
    numbers = torch.arange(start, start + images * views).float().view(images, views)
    moments = torch.stack([numbers, 0 * numbers], dim=2)[..., None, None, None].expand(-1, -1, -1, 4, 2, 2)
    return list(moments), list(numbers[..., None].expand(-1, -1, 6))


def test_each_row_has_the_sizes_of_the_view_that_it_shows():
    concept, sizes = numbered(3, 4, start=0)
    of_class, class_sizes = numbered(2, 3, start=100)
    latents = ConceptLatents(concept, of_class, (), sizes, class_sizes)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rows = latents.instance_rows(5, generator)
        for drawn in (rows, latents.prior_rows(4, generator), latents.another_of_each(rows, generator)):
            assert drawn.sizes is not None and torch.equal(drawn.sizes, drawn.latents[:, :, 0, 0].repeat(1, 2)[:, :6])


def test_sizes_are_known_of_both_kinds_of_images_or_of_neither():
    (concept, sizes), (of_class, _) = numbered(1, 1, 0), numbered(1, 1, 1)
    with pytest.raises(ValueError, match="or of neither"):
        ConceptLatents(concept, of_class, sizes=sizes)
    assert ConceptLatents(concept).instance_rows(1, torch.Generator()).sizes is None
