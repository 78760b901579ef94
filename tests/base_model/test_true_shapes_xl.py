"""Stable Diffusion XL in its true shapes, without its weights: what methods learn there, by hand and by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import BASELINE, METHOD_NAMES, method_class, recipe_class
from personalize_core.methods.interface import Method, count
from personalize_core.methods.shared.layer_modules import attention_projections
from tests.true_shapes import UNET, true_parts

CONCEPT = Concept("v", "<v>", "dog")
WORD = 768 + 1280  # what both text encoders read for one word, and what the cross-attention layers read
BLOCKS = {640: 10, 1280: 60}  # channels -> transformer blocks: two in each of 5 transformers, ten in each of 6
TRANSFORMERS = {640: 5, 1280: 6}
WHOLE_UNET = 2_567_463_684


@pytest.fixture(scope="module")
def full() -> BaseModel:
    parts = true_parts("sdxl-base-1.0")
    return BaseModel(name="sdxl-base-1.0", revision="none", weights_hash="none", **parts, device="meta")


def made(full: BaseModel, name: str, **chosen: Any) -> Method:
    kind: Any = method_class(name)
    with torch.device("meta"):
        return kind(kind.Config(**chosen), full, CONCEPT)


def over_projections(of_square: Any, of_text: Any) -> int:
    """Over the eight projections of each block: six of C channels to C, and keys and values, of the text's to C."""
    return sum(blocks * (6 * of_square(c) + 2 * of_text(c)) for c, blocks in BLOCKS.items())


def test_the_shapes_are_the_published_ones(full):
    """Podell et al. (2024), table 1: a U-Net of 2.6 B parameters, text encoders of 817 M, text of 2048 features; 70
    cross-attention layers, none of them in the U-Net's highest resolution."""
    assert count(full.unet) == WHOLE_UNET
    assert [count(each) for each in full.text_encoders.values()] == [123_060_480, 694_659_840]
    assert full.text_width == full.unet.config.cross_attention_dim == WORD
    assert (full.image_size, full.latent_shape) == (1024, (4, 128, 128))
    assert len(full.layers) == sum(BLOCKS.values()) == 70 and len(full.transformers) == 11
    channels = [block.module.attn2.to_q.in_features for block in full.blocks.values()]
    assert {c: channels.count(c) for c in channels} == BLOCKS


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("textual_inversion", {}, WORD),
        ("dreambooth", {}, WHOLE_UNET),
        ("ti_db", {}, WHOLE_UNET + WORD),
        ("attn_dreambooth", {}, WHOLE_UNET + WORD),
        ("core", {}, WHOLE_UNET + WORD),
        ("dti", {}, WORD),
        ("xti", {}, 11 * WORD),
        # two attentions, the feed-forward layer with GEGLU and three norms: in one transformer of 1280 and two of 640
        ("vico", {}, sum(n * (20 * c * c + 17 * c) for c, n in {1280: 1, 640: 2}.items()) + WORD),
        # 110 anchors of 2048 features, two layers of 128 units with their norms, and two heads: embedding and bypass
        ("neti", {}, 110 * 2049 + 111 * 128 + 129 * 128 + 2 * 256 + 129 * 2 * WORD),
        ("dco", {"rank": 32}, over_projections(lambda c: 32 * 2 * c, lambda c: 32 * (c + WORD)) + WORD),
        ("class_diffusion", {}, sum(2 * WORD * c * blocks for c, blocks in BLOCKS.items()) + WORD),
        ("custom_diffusion", {}, sum(2 * WORD * c * blocks for c, blocks in BLOCKS.items()) + WORD),
        # queries and outputs, the latter with a bias
        (
            "custom_diffusion",
            {"trained": "attn2"},
            sum((2 * WORD * c + 2 * c * c + c) * blocks for c, blocks in BLOCKS.items()) + WORD,
        ),
        ("lora_dreambooth", {}, over_projections(lambda c: 4 * 2 * c, lambda c: 4 * (c + WORD))),
        # r blocks of (n / r) x (n / r) for n inputs
        ("oft", {"r": 8}, over_projections(lambda c: c * c // 8, lambda c: WORD * WORD // 8)),
        ("t_lora", {"rank": 64}, over_projections(lambda c: 64 * (2 * c + 1), lambda c: 64 * (c + WORD + 1))),
        # a twentieth of the channels of each transformer
        ("personalized_residuals", {}, sum(2 * c * (c // 20) * n for c, n in TRANSFORMERS.items())),
    ],
)
def test_a_method_learns_as_many_numbers_as_its_formula_says(name, chosen, expected, full):
    assert count(made(full, name, **chosen)) == expected


def test_lora_changes_the_layers_that_diffusers_script_does_by_factors_of_their_shapes(full, tmp_path):
    """train_dreambooth_lora_sdxl.py: rank 4 on to_k, to_q, to_v and to_out.0, wherever the U-Net has one."""
    kind: Any = UNet2DConditionModel
    with torch.device("meta"):
        unet = kind(**UNET["sdxl-base-1.0"])
        unet.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
        )
    theirs = {name: tensor.shape for name, tensor in get_peft_model_state_dict(unet).items()}
    method: Any = made(full, "lora_dreambooth")
    ours = {}
    for path, change in method.changes.by_path():
        ours |= {f"{path}.lora_A.weight": change.A.shape, f"{path}.lora_B.weight": change.B.shape}
    assert ours == theirs and len(ours) == 2 * 8 * 70
    assert sum(shape.numel() for shape in theirs.values()) == count(method) == 5_806_080


def test_custom_diffusion_tunes_what_diffusers_processors_replace(full):
    """train_custom_diffusion.py: keys and values of every attention layer whose processor's name says attn2."""
    stock = {name.removesuffix(".processor") for name in full.unet.attn_processors if "attn2" in name}
    method: Any = made(full, "custom_diffusion")
    assert {name for name, _ in method.weights.items()} == {
        f"{p}.{kv}.weight" for p in stock for kv in ("to_k", "to_v")
    }


def test_oft_turns_the_inputs_of_the_same_projections(full):
    method: Any = made(full, "oft")
    assert method.rotations.paths() == list(attention_projections(full)) and len(method.rotations) == 8 * 70


def test_every_method_is_defined(full):
    assert not [name for name in METHOD_NAMES if recipe_class(name)().needs_one_text_encoder]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("dreambooth", {"train_text_encoder": True}), ("lora_dreambooth", {"targets": ("text_encoder",)})],
)
def test_an_option_that_needs_one_text_encoder_is_refused(name, chosen, full):
    with pytest.raises(InputError, match=r"is not defined on Stable Diffusion XL: .*text encoders"):
        made(full, name, **chosen)


def test_the_page_of_methods_lists_those_that_are_defined_with_their_counts(full):
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    _, _, section = page.partition("### On Stable Diffusion XL\n")
    rows = [line.split(" | ")[:2] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    expected = {recipe_class(name).display_name: count(made(full, name)) for name in METHOD_NAMES if name != BASELINE}
    assert {name.removeprefix("| "): int(number.replace(",", "")) for name, number in rows} == expected
