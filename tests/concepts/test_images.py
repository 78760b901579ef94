"""Concept images become upright, square RGB images in [-1, 1], and latents become rows that the seed alone chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from personalize_core.concepts.images import (
    CROPS,
    ROTATIONS,
    ConceptLatents,
    _shorter_side_to,
    centre_crop,
    to_pixels,
    views_of,
)
from personalize_core.concepts.preprocessing import Preprocessing
from tests.concepts.quarters import BLUE, GREEN, RED, WHITE, corners, quarters

CROP = Preprocessing("crop", "bilinear", flip=False)
SQUASH = Preprocessing("squash", "bicubic", flip=True)


# -- squares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 10), (10, 40), (17, 31), (5, 5)], ids=str)
@pytest.mark.parametrize("recipe", [CROP, SQUASH], ids=lambda recipe: recipe.key)
def test_every_view_is_square_whatever_the_concept_images_shape(recipe, size):
    views = views_of(recipe, quarters(*size), 16)
    assert {view.size for view in views} == {(16, 16)}


def test_a_crop_keeps_proportions_and_slides_from_end_to_end():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (16, 1))).convert("RGB")
    views = [np.asarray(view)[8, :, 0] for view in views_of(CROP, ramp, 16)]
    assert len(views) == CROPS
    assert [int(view[0]) for view in views] == [0, 12, 24, 36, 48]
    assert all(np.array_equal(np.diff(view), np.ones(15)) for view in views)


def test_sizes_before_a_crop_are_those_of_torchvision():
    """Which the scripts resize with; it rounds the longer side down."""
    rng = np.random.default_rng(0)
    for width, height in rng.integers(16, 60, (200, 2)).tolist():
        image = Image.new("L", (width, height))
        theirs: Any = functional.resize(image, [16])  # type: ignore[arg-type]
        assert _shorter_side_to(16, image, Image.Resampling.BILINEAR).size == theirs.size


def test_a_tall_concept_image_is_cropped_along_its_height():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None], (1, 16))).convert("RGB")
    assert [int(np.asarray(view)[0, 8, 0]) for view in views_of(CROP, ramp, 16)] == [0, 12, 24, 36, 48]


def test_a_square_concept_image_has_one_crop():
    assert len(views_of(CROP, quarters(16, 16), 8)) == 1


def test_squashing_keeps_the_whole_concept_image():
    assert corners(views_of(SQUASH, quarters(64, 16), 16)[0]) == [RED, GREEN, BLUE, WHITE]


def test_a_flip_doubles_the_views():
    plain, flipped = views_of(SQUASH, quarters(64, 16), 16)
    assert corners(flipped) == [GREEN, RED, WHITE, BLUE]
    assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(flipped))


def test_the_middle_square_keeps_proportions():
    (view,) = views_of(Preprocessing("centre", "bilinear", flip=False), quarters(64, 16), 16)
    assert np.array_equal(np.asarray(view), np.asarray(quarters(64, 16).crop((24, 0, 40, 16))))


@pytest.mark.parametrize("size", [(40, 40), (60, 30), (30, 50)], ids=str)
def test_rotated_views_are_outcomes_of_attndreambooths_code(size):
    """With torchvision's functions: three quarters turned by up to 45 degrees, a quarter mirrored, any crop."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    views, outcomes = views_of(Preprocessing("rotate", "bilinear", flip=True), noise, 16), []
    assert len(views) == ROTATIONS
    for view in views:
        found = [
            (angle, flipped)
            for angle in (0.0, *(-45 + 90 * (k + 0.5) / 24 for k in range(24)))
            for flipped in (False, True)
            if is_a_crop(np.asarray(view), turned(noise, angle, flipped))
        ]
        assert len(found) == 1
        outcomes += found
    assert len({angle for angle, _ in outcomes}) == 1 + ROTATIONS * 3 / 4  # no angle twice but 0
    counts = {(turned, flipped): 0 for turned in (False, True) for flipped in (False, True)}
    for angle, flipped in outcomes:
        counts[angle != 0, flipped] += 1
    shares = {(False, False): 3 / 16, (False, True): 1 / 16, (True, False): 9 / 16, (True, True): 3 / 16}  # independent
    assert counts == {outcome: share * ROTATIONS for outcome, share in shares.items()}


def turned(image: Any, angle: float, flipped: bool) -> np.ndarray:
    kind = functional.InterpolationMode
    canvas: Any = functional.rotate(image, angle, kind.NEAREST, expand=True) if angle else image
    resized: Any = functional.resize(canvas, [16], kind.BILINEAR)
    return np.asarray(functional.hflip(resized) if flipped else resized)


def is_a_crop(view: np.ndarray, whole: np.ndarray) -> bool:
    places = np.lib.stride_tricks.sliding_window_view(whole, view.shape)
    return bool((places == view).all(axis=(-3, -2, -1)).any())


def test_the_first_of_the_rotated_views_stands_as_the_concept_image_does_and_its_corners_are_black():
    upright, turned = views_of(Preprocessing("rotate", "bilinear", flip=True), quarters(40, 40), 16)[:2]
    assert corners(upright) == [RED, GREEN, BLUE, WHITE]
    assert corners(turned) == [(0, 0, 0)] * 4


def test_without_flip_no_rotated_view_is_mirrored():
    plain, flipped = (
        views_of(Preprocessing("rotate", "bilinear", flip=flip), quarters(40, 40), 16) for flip in (False, True)
    )
    differ = [index for index in range(ROTATIONS) if plain[index].tobytes() != flipped[index].tobytes()]
    assert len(differ) == ROTATIONS / 4
    assert all(np.array_equal(np.asarray(plain[i])[:, ::-1], np.asarray(flipped[i])) for i in differ)


def test_what_differs_is_cached_under_another_name():
    geometries: Any = ("squash", "centre", "crop", "rotate", "zoom")
    interpolations: Any = ("bicubic", "bilinear")
    recipes = [
        Preprocessing(geometry, interpolation, flip)
        for geometry in geometries
        for interpolation in interpolations
        for flip in (False, True)
    ]
    assert len({recipe.key for recipe in recipes}) == len(recipes)


def test_the_interpolation_is_the_one_asked_for():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    geometries: Any = ("squash", "centre", "crop")
    filters: Any = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    for name, filter in filters.items():
        for geometry in geometries:
            (view,) = views_of(Preprocessing(geometry, name, flip=False), noise, 16)
            assert np.array_equal(np.asarray(view), np.asarray(noise.resize((16, 16), filter)))


def test_the_centre_is_the_middle_of_the_concept_image():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (16, 1))).convert("RGB")
    assert np.asarray(centre_crop(ramp, 16))[0, :, 0].tolist() == list(range(24, 40))


def test_pixels_run_from_minus_one_to_one_channels_first():
    pixels = to_pixels([Image.new("RGB", (2, 3), (0, 255, 51))])
    assert pixels.shape == (1, 3, 3, 2) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))


# -- latents ---------------------------------------------------------------------------------------------------


def numbered(concept_images: int, views: int = 1, deviation: float = 0.0) -> list[torch.Tensor]:
    """Moments whose mean says which concept image and view they are of: concept image + view / 10."""
    return [
        torch.stack(
            [torch.stack([torch.full((4, 2, 2), p + v / 10), torch.full((4, 2, 2), deviation)]) for v in range(views)]
        )
        for p in range(concept_images)
    ]


def sampled(latents: torch.Tensor) -> list[float]:
    return [round(float(row.mean()), 3) for row in latents]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_concept_image_comes_twice_before_all_came_once():
    rows = sampled(ConceptLatents(numbered(3)).instances(7, generator()))
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_every_concept_image_and_every_view_is_sampled_about_equally_often():
    latents = ConceptLatents(numbered(3, views=2))
    rows = [row for seed in range(600) for row in sampled(latents.instances(1, generator(seed)))]
    counts = {row: rows.count(row) for row in set(rows)}
    assert set(counts) == {0.0, 0.1, 1.0, 1.1, 2.0, 2.1}
    assert all(abs(count - 100) < 46 for count in counts.values())  # five standard deviations


def test_latents_are_sampled_anew_from_mean_and_deviation():
    latents = ConceptLatents(numbered(1, deviation=0.5))
    rows = torch.stack([latents.instances(1, generator(seed))[0] for seed in range(2000)])
    assert not torch.equal(rows[0], rows[1])
    assert abs(rows.mean()) < 0.02 and abs(rows.std() - 0.5) < 0.02


def test_the_generator_alone_decides():
    latents = ConceptLatents(numbered(3, views=2, deviation=1.0))
    torch.manual_seed(1)
    first = latents.instances(5, generator(7))
    torch.manual_seed(2)
    assert torch.equal(latents.instances(5, generator(7)), first)
    assert not torch.equal(latents.instances(5, generator(8)), first)


def test_a_row_says_which_concept_image_and_which_view_it_shows():
    latents = ConceptLatents(numbered(3, views=4), class_images=numbered(2, views=3))
    for seed in range(10):
        for rows in (latents.instance_rows(5, generator(seed)), latents.prior_rows(5, generator(seed))):
            named = [round(p + v / 10, 3) for p, v in zip(rows.images, rows.views, strict=True)]
            assert named == sampled(rows.latents)
        assert torch.equal(latents.instances(5, generator(seed)), latents.instance_rows(5, generator(seed)).latents)


def test_class_images_are_sampled_from_their_own():
    latents = ConceptLatents(numbered(2), class_images=numbered(4)[2:])
    assert sorted(sampled(latents.prior_rows(2, generator()).latents)) == [2, 3]
    assert len(latents) == 2


def test_without_class_images_there_is_nothing_to_sample_them_from():
    with pytest.raises(ValueError, match="no class images; the method has to ask for them in `class_images`"):
        ConceptLatents(numbered(2)).prior_rows(1, generator())
