"""What is looked at on Stable Diffusion XL: pairs of embeddings, and several layers in a transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.analyses.context_tokens import outputs
from personalize_core.analyses.heat_maps import heat_maps
from personalize_core.analyses.learned_embedding import vocabulary, what_is_read
from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import method_class
from personalize_core.sampling.sampler import initial_noise, make_sampler
from tests.conftest import disturbed, tiny_xl

CONCEPT = Concept("v", "<v>", "dog")
PROMPT = "a photo of <v> dog on the beach"


@pytest.fixture(scope="module")
def xl() -> BaseModel:
    return tiny_xl()


def made(name: str, base: BaseModel) -> Any:
    kind: Any = method_class(name)
    return disturbed(kind(kind.Config(), base, CONCEPT)).eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "count"), [("textual_inversion", 1), ("core", 1), ("xti", 4), ("neti", 4)])
def test_what_both_encoders_read_of_the_placeholder_is_what_was_learned(name, count, xl):
    method = made(name, xl)
    learned = {
        "xti": lambda: method.embeddings,
        "neti": lambda: method.mapper(torch.tensor([500]))[0][:, 0],
    }.get(name, lambda: method.embedding.vector[None])()
    found = what_is_read(method, xl)
    assert found.shape == (count, 48)
    torch.testing.assert_close(found, learned.detach(), atol=1e-4, rtol=1e-4)


def test_the_vocabulary_has_both_encoders_embeddings_side_by_side(xl):
    words, table = vocabulary(xl)
    row = words.index("dog")
    np.testing.assert_allclose(table[row], xl.word_embedding("dog").double().numpy())
    assert table.shape == (len(words), 48)


@pytest.mark.parametrize(("name", "count"), [("textual_inversion", 1), ("xti", 4)])
def test_a_words_output_is_known_for_each_text_that_is_read(name, count, xl):
    method = made(name, xl)
    context = method.condition(xl, ["a photo of <v> on the beach"])(torch.tensor([500]))
    assert outputs(xl, context, "a photo of <v> on the beach", CONCEPT).shape[::2] == (count, 48)


def test_heat_maps_are_the_mean_over_all_layers_but_those_of_the_middle(xl):
    """Of one step: the layers of the two resolutions' transformers have the same locations here."""
    method, noise = made("textual_inversion", xl), initial_noise(xl, 0, [(0, 0)])
    found = heat_maps(method, xl, PROMPT, noise, make_sampler("ddim", xl), 1, 3.0)
    context = method.condition(xl, [PROMPT])(torch.tensor([1]))
    seen = AttentionMaps()
    scheduler = make_sampler("ddim", xl)
    with torch.no_grad(), method.attach(xl):

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return xl.denoise(x, t, context, seen)

        scheduler(watched, noise, 1)
    layers = [layer for layer in seen if not layer.startswith("mid_block")]
    assert len(layers) == 6 and len(found.words) == len(PROMPT.split())
    place = int(context.placeholder[0].int().argmax())
    mean = torch.stack([seen[layer][0, :, :, place].mean(dim=0) for layer in layers]).mean(dim=0).view(4, 4)
    (number,) = found.concept
    small = found.maps[number].view(4, 16, 4, 16).mean(dim=(1, 3))
    assert torch.corrcoef(torch.stack([small.flatten(), mean.flatten()]))[0, 1] > 0.95
