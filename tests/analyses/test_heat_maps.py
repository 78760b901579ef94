"""Heat maps: the same as attention computed by hand beside the U-Net, and the image is the one sampled unwatched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from personalize_core.analyses.heat_maps import SIDE, HeatMaps, heat_maps, metrics, overlay, save_grid
from personalize_core.base_model.hooks import hooked
from personalize_core.methods.textual_inversion.method import Config, TextualInversion
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from tests.conftest import LAYERS, disturbed

PROMPT = "a photo of <v> in the jungle"
STEPS, GUIDANCE = 3, 6.0


@pytest.fixture
def method(base, concept) -> Any:
    return disturbed(TextualInversion(Config(), base, concept), seed=2).eval()


@pytest.fixture
def noise(base):
    return initial_noise(base, 0, [(0, 0)])


def watched(method, base, noise, prompt=PROMPT):
    return heat_maps(method, base, prompt, noise, make_sampler("ddim", base), STEPS, GUIDANCE)


def test_watching_changes_no_image(method, base, noise):
    plain = sample(method, base, [PROMPT], noise, make_sampler("ddim", base), STEPS, GUIDANCE)
    assert torch.equal(watched(method, base, noise).latents, plain)


def test_the_maps_are_those_of_queries_and_keys_taken_by_hooks(method, base, noise):
    """A second implementation: hooks on to_q and to_k, softmax in float64, loops over layers, heads, steps, tokens."""
    queries: dict[str, list] = {layer: [] for layer in LAYERS}
    keys: dict[str, list] = {layer: [] for layer in LAYERS}

    def keep(into):
        return lambda module, args, answer: into.append(answer[1].double().numpy())  # of both halves the second

    hooks = []
    for layer in LAYERS:
        attention = base.transformers[layer].transformer_blocks[0].attn2
        hooks += [attention.to_q.register_forward_hook(keep(queries[layer]))]
        hooks += [attention.to_k.register_forward_hook(keep(keys[layer]))]
    with hooked(*hooks):
        found = watched(method, base, noise)

    enlarged: list[list] = [[] for _ in found.words]
    for layer in LAYERS:
        heads = base.transformers[layer].transformer_blocks[0].attn2.heads
        if layer.startswith("mid"):
            continue
        assert len(queries[layer]) == STEPS
        for head in range(heads):
            summed: Any = 0
            for q, k in zip(queries[layer], keys[layer], strict=True):
                width = q.shape[-1] // heads
                part = slice(head * width, (head + 1) * width)
                scores = q[:, part] @ k[:, part].T / math.sqrt(width)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                summed = summed + weights / weights.sum(axis=1, keepdims=True)
            side = math.isqrt(len(summed))
            for word in range(len(found.words)):
                token = torch.from_numpy(summed[:, word + 1].reshape(1, 1, side, side))  # 0 is the start of the text
                large = F.interpolate(token, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
                enlarged[word].append(large[0, 0].clamp(min=0))
    by_hand = torch.stack([torch.stack(maps).mean(dim=0) for maps in enlarged])
    assert found.words == PROMPT.split()
    assert torch.allclose(found.maps.double(), by_hand, atol=1e-5)
    assert found.maps.dtype == torch.float32


def test_a_word_of_several_tokens_is_the_mean_of_their_maps(method, base, noise, concept):
    tokens = base.tokenizer(["a photo of <v> kite"], concept)
    assert int(tokens.words.sum()) == 8  # k, i, t, e: the tiny vocabulary does not know the word
    found = watched(method, base, noise, "a photo of <v> kite")
    assert found.words == ["a", "photo", "of", "<v>", "kite"]
    spelled = base.tokenizer.spelled("a photo of <v> kite", concept)
    assert [positions for _, positions in spelled] == [[1], [2], [3], [4], [5, 6, 7, 8]]


def test_the_concepts_words_are_found(method, base, noise):
    found = watched(method, base, noise, "a photo of <v> dog on the beach")
    assert [found.words[n] for n in found.concept] == ["<v>"]
    assert [found.words[n] for n in found.class_noun] == ["dog"]


def test_what_is_read_off_a_map():
    flat, point, half = torch.ones(SIDE, SIDE), torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    point[3, 5] = 2.0
    half[:, : SIDE // 2] = 4.0
    maps = HeatMaps(torch.zeros(1, 4, 8, 8), ["a", "b", "c"], torch.stack([flat, point, half]), [], [])
    expected = torch.tensor([math.log(SIDE**2), 0.0, math.log(SIDE**2 / 2)]).double()
    assert torch.allclose(maps.entropies(), expected)
    shares = maps.shares()
    assert not shares[0].any() and shares[1].sum() == 1 and shares[2].mean() == 0.5
    assert maps.overlap(1, 2) == pytest.approx(1 / (SIDE * SIDE / 2))
    assert maps.overlap(2, 2) == 1 and maps.overlap(0, 1) == 0


def test_where_a_map_is_cold_the_image_shows_and_where_it_is_hot_jets_dark_red():
    share = torch.zeros(SIDE, SIDE)
    share[:, SIDE // 2 :] = 1
    shown = np.asarray(overlay(Image.new("RGB", (64, 64), (10, 200, 30)), share, side=128))
    assert shown.shape == (128, 128, 3)
    assert (shown[:, :50] == (10, 200, 30)).all()
    assert (shown[:, -50:] == (128, 0, 0)).all()


def test_the_numbers_name_their_words_and_compare_the_concept_with_its_class_noun(tmp_path):
    flat, left = torch.ones(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 3.0
    maps = HeatMaps(torch.zeros(1, 4, 8, 8), ["a", "<v>", "dog"], torch.stack([flat, left, 2 * left]), [1], [2])
    read = metrics(maps)
    assert [row["word"] for row in read["words"]] == ["a", "<v>", "dog"]
    assert [row["mean"] for row in read["words"]] == [1.0, 1.5, 3.0]
    assert read["overlap of concept and class noun"] == 1.0
    alone = HeatMaps(maps.latents, ["a", "<v>"], maps.maps[:2], [1], [])
    assert metrics(alone)["overlap of concept and class noun"] is None
    save_grid(
        {"one": maps, "two": maps},
        dict.fromkeys(("one", "two"), np.zeros((16, 16, 3), np.uint8)),
        tmp_path / "m.png",
        "",
    )
    with Image.open(tmp_path / "m.png") as sheet:
        assert sheet.width > 4 * 160 and sheet.height > 2 * 160  # the image and three words, two rows
