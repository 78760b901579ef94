"""The world: what is drawn depends on the seed alone, and the mask says where the thing is."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from personalize_core.mini import autoencoder, concepts, names, world
from personalize_core.mini.diffusion import cached_scene, held_out
from personalize_core.mini.sprites import FOLDER


def scenes(seed, count, **odds):
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, **odds) for _ in range(count)]


def test_the_same_seed_draws_the_same_scene():
    for once, again in zip(scenes(3, 12), scenes(3, 12), strict=True):
        assert once == again
        assert all(np.array_equal(a, b) for a, b in zip(world.draw(once), world.draw(again), strict=True))


def test_another_seed_draws_another():
    assert scenes(3, 4) != scenes(4, 4)


def test_repainting_the_thing_changes_nothing_far_outside_its_mask():
    for scene in scenes(5, 8, plain=1, photo=1):
        other = replace(scene, design=replace(scene.design, colours=("teal", "teal")))
        (image, mask), (repainted, _) = world.draw(scene), world.draw(other)
        near = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(7))) > 0
        assert np.array_equal(image[~near], repainted[~near])
        assert not np.array_equal(image[mask > 0], repainted[mask > 0])


def test_a_mask_covers_a_good_part_of_the_picture_and_not_all():
    shares = [(world.draw(scene)[1] > 0).mean() for scene in scenes(6, 30)]
    assert 0.08 < min(shares) and max(shares) < 0.75


def test_the_full_caption_says_what_is_drawn():
    for scene in scenes(7, 40):
        said = world.caption(scene)
        assert scene.category in said and names.PLACES[scene.place] in said
        assert (scene.design.colours[0] in said) == (scene.style != "sketch")


@pytest.mark.parametrize("name", list(concepts.DESIGNS))
def test_what_is_committed_of_a_concept_is_what_the_world_draws(name):
    for number, place in enumerate(concepts.PLACES[name]):
        image, mask = world.draw(concepts.scene(name, place, number))
        folder = concepts.FOLDER / name
        assert np.array_equal(image, np.asarray(Image.open(folder / f"{number:02d}.png")))
        assert np.array_equal(mask, np.asarray(Image.open(folder / "masks" / f"{number:02d}.png")))


def test_no_training_scene_shows_a_sprite_of_a_concept():
    used = {
        sprite for drawn in (names.VARIANTS, names.MORE_VARIANTS) for sprites in drawn.values() for sprite in sprites
    }
    kept = set(names.HELD_OUT.values())
    assert not used & kept
    assert used | kept == {path.stem for path in FOLDER.glob("*.png")}
    assert {design.sprite for design in concepts.DESIGNS.values()} <= kept


def test_held_out_words_are_in_no_training_scene():
    combinations = [(s.category, s.design.colours[0], s.place) for s in (cached_scene(0, n) for n in range(300))]
    plain = [s.design.layout == "plain" for s in (cached_scene(0, n) for n in range(300))]
    assert not any(held_out(*c) for c, one in zip(combinations, plain, strict=True) if one)
    assert any(held_out(c, k, p) for c in names.CATEGORIES for k in names.COLOURS for p in names.PLACES)


def test_of_two_things_the_first_is_on_the_left_and_both_are_named_in_order():
    rng = np.random.default_rng(8)
    for scene in [world.random_pair(rng) for _ in range(20)]:
        beside = scene.beside or pytest.fail("one thing only")
        assert scene.category != beside.category
        said = world.caption(scene)
        assert said.index(f"{scene.category} next to a ") < said.rindex(beside.category)
        both, left, right = (
            world.draw(s)[1] > 0
            for s in (
                scene,
                replace(scene, beside=None),
                replace(scene, category=beside.category, design=beside.design, pose=beside.pose, beside=None),
            )
        )
        assert np.array_equal(both, left | right)
        assert np.flatnonzero(left.any(0)).mean() < 32 < np.flatnonzero(right.any(0)).mean()
        assert (left & right).sum() < 0.05 * both.sum()


def test_a_picture_is_softened_as_a_gaussian_of_three_taps_would():
    from scipy.ndimage import gaussian_filter

    image = np.random.default_rng(9).random((64, 64, 3))
    blurred = gaussian_filter(image, (world.SOFTNESS, world.SOFTNESS, 0), mode="nearest", radius=1)
    assert np.allclose(world.softened(image), blurred, atol=1e-12)


def test_clutter_is_drawn_from_the_seed_and_its_mask_covers_what_was_put_on_the_place():
    images, masks = autoencoder.cluttered(np.random.default_rng(10), 6)
    again, _ = autoencoder.cluttered(np.random.default_rng(10), 6)
    assert np.array_equal(images, again) and images.shape == (6, 64, 64, 3)
    assert 0.1 < (masks > 0).mean() < 0.9


def test_a_sprite_that_is_not_bent_stays_and_a_bent_one_is_wider_or_leans_or_tapers():
    grid = np.ones((40, 20), np.float32)
    assert np.array_equal(world.shaped(grid, (0.0, 0.0, 0.0)), grid)
    wider = world.shaped(grid, (np.log(2), 0.0, 0.0))
    assert wider.shape[1] / wider.shape[0] == pytest.approx(2 * 20 / 40, rel=0.08)
    widths = (world.shaped(grid, (0.0, 0.4, 0.0)) > 0.5).sum(axis=1)
    assert widths[0] == pytest.approx(0.6 * widths[-1], abs=1.5) and (np.diff(widths.astype(int)) >= 0).all()
    assert (world.shaped(grid, (0.0, -0.4, 0.0)) > 0.5).sum(axis=1)[0] == 20
    leaning = world.shaped(grid, (0.0, 0.0, 0.5)) > 0.5
    top, foot = (np.flatnonzero(leaning[row]).mean() for row in (0, -1))
    assert top - foot == pytest.approx(0.5 * 20, abs=1)


def test_a_caption_says_names_in_the_place_of_colours_and_categories():
    scene = world.random_pair(np.random.default_rng(11), photo=1)
    said = world.caption(scene, None, ["sks", None])
    assert said.startswith("a photo of a sks next to a ") and scene.category not in said.split()
    assert scene.beside and said.replace(names.PLACES[scene.place], "").strip().endswith(scene.beside.category)
