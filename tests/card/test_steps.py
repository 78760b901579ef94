"""The steps from concept images to analyses, and every kind of encoder, on a card, by tiny models with real numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core import steps
from personalize_core.base_model.loading import load_base_model
from personalize_core.files.atomic import read_json
from personalize_core.metrics import features, masc, masks
from personalize_core.metrics.encoders import load_identity_encoder, load_text_image_encoder
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.metrics.test_dino_encoders import dinov2, dinov3  # noqa: F401  fixtures, as are the next three
from tests.metrics.test_masc import folder as naflex  # noqa: F401
from tests.metrics.test_masks import clipseg_folder  # noqa: F401
from tests.metrics.test_siglip_encoders import siglip  # noqa: F401

pytestmark = pytest.mark.usefixtures("card", "short_checks")

METHODS = ("base_model", "textual_inversion", "dreambooth")  # the last needs class images


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """On a machine of one core: the pretended card is one of this thread's alone, so encoders must run in it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    tiny_workspace.make(tmp_path)
    values = tiny_workspace.params(tmp_path) | {"device": "cuda", "precision": "bf16"}
    yield tiny_workspace.write_params(tmp_path, values)
    load_base_model.cache_clear()
    features._loaded.cache_clear()


def test_the_steps_of_a_cell_compute_on_the_card(store):
    for method in METHODS:
        for step in (steps.train, steps.sample_grid, steps.score, steps.analyse):
            step(store, "rex", method)
    steps.score_references(store, "rex")
    for method in METHODS[1:]:
        costs = read_json(store.training_costs(method, "rex"))
        assert costs["device"] == "a pretended card" and costs["peak_memory_bytes"] > 0
        assert read_json(store.artifact(method, "rex") / "proof.json")["device"] == "cuda"


def images() -> list[Image.Image]:
    rng, sizes = np.random.default_rng(0), [(90, 60), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.device.type == other.device.type == "cpu"
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mini-clip", "siglip"])
def test_an_encoder_of_texts_and_images_gives_the_features_it_gives_on_the_cpu(name, request):
    given = name if name.startswith("mini") else request.getfixturevalue(name)
    on_card, on_cpu = (load_text_image_encoder(given, device) for device in ("cuda", "cpu"))
    close(on_card.images(images()), on_cpu.images(images()))
    close(on_card.texts(["a photo of a dog", "a cat"]), on_cpu.texts(["a photo of a dog", "a cat"]))


@pytest.mark.parametrize("name", ["mini-identity", "dinov2", "dinov3"])
def test_an_identity_encoder_gives_the_features_it_gives_on_the_cpu(name, request):
    given = name if name.startswith("mini") else request.getfixturevalue(name)
    on_card, on_cpu = (load_identity_encoder(given, device) for device in ("cuda", "cpu"))
    close(on_card.images(images()), on_cpu.images(images()))


@pytest.mark.parametrize("name", ["mini-segmenter", "clipseg_folder"])
def test_a_segmenter_finds_the_masks_it_finds_on_the_cpu(name, request):
    given = name if name.startswith("mini") else str(request.getfixturevalue(name))
    on_card, on_cpu = (masks.load_segmenter(given, device).masks(images(), "dog") for device in ("cuda", "cpu"))
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(on_card, on_cpu, strict=True))


def test_masc_gives_the_patches_it_gives_on_the_cpu(naflex):  # noqa: F811
    shown = [np.arange(image.width * image.height).reshape(image.height, image.width) % 40 < 20 for image in images()]
    one, other = (masc.load_masc(str(naflex), device) for device in ("cuda", "cpu"))
    for on_card, on_cpu in zip(one.images(images(), shown), other.images(images(), shown), strict=True):
        # Scores are made of cosines.
        assert torch.cosine_similarity(on_card.tokens, on_cpu.tokens).min() > 0.9999
        assert torch.equal(on_card.foreground, on_cpu.foreground)
    close(one.texts(["a dog"]), other.texts(["a dog"]))
