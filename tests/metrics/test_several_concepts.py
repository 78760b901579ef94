"""Images of several concepts: each part is compared with each concept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.metrics.several_concepts import identity_of_parts, windows


class Colours:
    """An identity encoder whose features are the image's mean colour, centred."""

    name = weights_hash = preprocessing = "colours"
    looks_for: str | None = None

    def images(self, images):
        means = np.stack([np.asarray(image).astype(np.float64).mean((0, 1)) for image in images])
        return torch.from_numpy(means - means.mean(axis=1, keepdims=True) + 1e-9)


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def beside(left, right):
    """A grey image with a square of each colour, a quarter as wide as the image, low in its half."""
    image = plain((128, 128, 128))
    image.paste(plain(left, (32, 32)), (0, 32))
    image.paste(plain(right, (32, 32)), (32, 32))
    return image


@pytest.mark.parametrize(("size", "parts"), [((64, 64), 2), ((60, 90), 3), ((512, 512), 2), ((40, 20), 2)])
def test_the_windows_are_squares_that_cover_every_column_from_top_to_bottom(size, parts):
    columns = np.arange(size[0])[None].repeat(size[1], 0)
    rows = np.arange(size[1])[:, None].repeat(size[0], 1)
    image = Image.fromarray(np.stack([columns % 256, rows % 256, columns // 256 + 2 * (rows // 256)], -1).astype("u1"))
    for part, squares in enumerate(windows(image, parts)):
        seen = np.zeros(size[1], bool)
        for square in squares:
            values = np.asarray(square).astype(int)
            assert square.width == square.height == size[0] // parts
            assert values[0, 0, 0] + 256 * (values[0, 0, 2] % 2) == part * (size[0] // parts)
            seen[values[:, 0, 1] + 256 * (values[:, 0, 2] // 2)] = True
        assert seen.all()


def test_each_part_is_most_like_the_concept_that_it_shows():
    red, blue = (200, 30, 30), (30, 30, 200)
    alike = identity_of_parts([beside(red, blue), beside(blue, red)], [[plain(red)] * 2, [plain(blue)]], Colours())
    assert alike.shape == (2, 2, 2)
    assert torch.allclose(alike[0].diagonal(), torch.ones(2).double()) and alike[0, 0, 1] < 0.5 > alike[0, 1, 0]
    assert torch.allclose(alike[1], alike[0].flip(0))


def test_the_best_square_of_a_part_counts_as_the_mean_cosine_with_the_concept_images():
    image, concept_images = beside((200, 30, 30), (30, 30, 200)), [plain((250, 30, 80)), plain((90, 20, 70))]
    found = identity_of_parts([image], [concept_images, [plain((0, 255, 0))]], Colours())[0, 0, 0]
    rows = [np.asarray(square).astype(float).mean((0, 1)) for square in windows(image, 2)[0]]
    references = [np.asarray(concept_image).astype(float).mean((0, 1)) for concept_image in concept_images]
    centred = [[v - v.mean() + 1e-9 for v in group] for group in (rows, references)]
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in centred[1]] for a in centred[0]]
    assert float(found) == pytest.approx(np.mean(cosines, axis=1).max(), abs=1e-6)
