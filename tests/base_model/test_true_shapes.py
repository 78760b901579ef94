"""Stable Diffusion 1.4 and 2.1 in their true shapes, without their weights (torch's meta device)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import method_class
from personalize_core.methods.interface import count
from personalize_core.methods.shared.layer_modules import attention_projections
from tests.true_shapes import PREDICTION, true_parts


@pytest.fixture(params=["sd-1.4", "sd-2.1"], scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def full(name) -> BaseModel:
    return BaseModel(name=name, revision="none", weights_hash="none", **true_parts(name), device="meta")


def learned(full: BaseModel, method: str, **chosen) -> int:
    """How many numbers a method learns on it."""
    kind: Any = method_class(method)
    with torch.device("meta"):
        return count(kind(kind.Config(**chosen), full, Concept("v", "<v>", "dog")))


def expected(name: str, sd14: int, sd21: int) -> int:
    return {"sd-1.4": sd14, "sd-2.1": sd21}[name]


def test_the_shapes_are_the_published_ones(full, name):
    """Parameters of the U-Net and of the text encoder of Rombach et al. (2022); native sizes."""
    assert count(full.unet) == expected(name, 859_520_964, 865_910_724)
    assert count(full.text_encoders["text_encoder"]) == expected(name, 123_060_480, 340_387_840)
    assert full.image_size == expected(name, 512, 768)
    assert full.text_width == expected(name, 768, 1024)
    assert full.prediction_type == PREDICTION[name]


def test_textual_inversion_learns_one_embedding(full, name):
    assert learned(full, "textual_inversion") == expected(name, 768, 1024)


def test_dti_learns_one_embedding(full, name):
    assert learned(full, "dti") == expected(name, 768, 1024)


def test_dco_learns_two_factors_for_each_projection_and_one_embedding(full, name):
    factors = sum(32 * (layer.in_features + layer.out_features) for layer in attention_projections(full).values())
    assert learned(full, "dco") == factors + expected(name, 768, 1024)


def test_class_diffusion_learns_what_custom_diffusion_does(full, name):
    assert learned(full, "class_diffusion") == expected(name, 19_170_048, 25_560_064)


def test_dreambooth_learns_the_whole_unet(full, name):
    assert learned(full, "dreambooth") == expected(name, 859_520_964, 865_910_724)


def test_dreambooth_with_the_text_encoder_learns_both(full, name):
    assert learned(full, "dreambooth", train_text_encoder=True) == expected(name, 982_581_444, 1_206_298_564)


def test_ti_db_learns_the_whole_unet_and_one_embedding(full, name):
    assert learned(full, "ti_db") == expected(name, 859_521_732, 865_911_748)


def test_custom_diffusion_learns_keys_and_values_and_one_embedding(full, name):
    assert learned(full, "custom_diffusion") == expected(name, 19_169_280 + 768, 25_559_040 + 1_024)


def test_custom_diffusion_of_the_whole_cross_attention_learns_what_attndreambooths_second_stage_does(full, name):
    assert learned(full, "custom_diffusion", trained="attn2") == expected(name, 43_962_560 + 768, 50_352_320 + 1_024)


def test_neti_learns_a_small_network_on_both(full, name):
    assert learned(full, "neti") == expected(name, 563_616, 629_664)
    assert learned(full, "neti", bypass=False) == expected(name, 464_544, 497_568)


def test_attndreambooth_learns_more_from_stage_to_stage(full, name):
    """Its three stages (Pang et al. 2024): the embedding, the cross-attention, the whole U-Net."""
    none: Any = {"embedding_steps": 0, "attention_steps": 0, "unet_steps": 0}
    alone = [learned(full, "attn_dreambooth", **(none | {f"{s}_steps": 1})) for s in ("embedding", "attention", "unet")]
    assert alone == [expected(name, 768, 1_024), expected(name, 43_962_560, 50_352_320), count(full.unet)]
    assert learned(full, "attn_dreambooth") == expected(name, 859_520_964 + 768, 865_910_724 + 1_024)


def test_core_learns_one_embedding_and_then_the_whole_unet(full, name):
    assert learned(full, "core", unet_steps=0) == expected(name, 768, 1_024)
    assert learned(full, "core", embedding_steps=0) == expected(name, 859_520_964, 865_910_724)
    assert learned(full, "core") == expected(name, 859_520_964 + 768, 865_910_724 + 1_024)


def test_personalized_residuals_learn_the_papers_count_on_both(full):
    assert learned(full, "personalized_residuals") == 1_239_040


def test_their_ranks_are_a_twentieth_of_the_channels(full):
    """Ham et al. 2024, 5 % of the channels: 320 -> 16, 640 -> 32, 1280 -> 64."""
    kind: Any = method_class("personalized_residuals")
    with torch.device("meta"):
        residuals = kind(kind.Config(), full, Concept("v", "<v>", "dog")).residuals
    assert {tuple(residual.A.shape) for residual in residuals.values()} == {(320, 16), (640, 32), (1280, 64)}


def test_oft_learns_as_many_numbers_as_its_blocks_hold(full, name):
    """Stored values, and the free ones of skew-symmetric blocks: the strict upper triangles (Qiu et al. 2023)."""
    assert learned(full, "oft") == expected(name, 23_304_192, 26_974_208)
    kind: Any = method_class("oft")
    with torch.device("meta"):
        rotations = kind(kind.Config(), full, Concept("v", "<v>", "dog")).rotations.values()
    blocks = [rotation.A.shape for rotation in rotations]
    assert sum(r * n * (n - 1) // 2 for r, n, _ in blocks) == expected(name, 11_602_368, 13_433_280)


@pytest.mark.parametrize(("r", "metrics"), [(2, 46_608_384), (8, 11_652_096), (16, 5_826_048)])
def test_more_blocks_of_oft_hold_fewer_numbers(r, metrics, full, name):
    if name == "sd-1.4":
        assert learned(full, "oft", r=r) == metrics
    assert learned(full, "oft", r=r, block_share=True) * r == learned(full, "oft", r=r)


def test_rescaled_oft_learns_a_factor_for_each_output_neuron(full):
    """Of 16 blocks: two attentions with four projections each, as wide as the block."""
    widths = 8 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert learned(full, "oft", rescaled=True) - learned(full, "oft") == widths


def test_vico_learns_four_blocks_and_an_embedding(full, name):
    """The image cross-attention of every other decoder block (Hao et al. 2023), and the embedding."""
    assert learned(full, "vico") == 51_248_960 + expected(name, 768, 1024)
    assert learned(full, "vico", image_attention=False) == expected(name, 768, 1024)


def test_lora_learns_two_factors_for_each_projection(full, name):
    """Rank 4 at the four projections of both attentions of each block (Hu et al. 2021)."""
    assert learned(full, "lora_dreambooth") == expected(name, 797_184, 829_952)


def test_xti_learns_sixteen_embeddings(full, name):
    """One for each cross-attention layer (Voynov et al. 2023)."""
    assert learned(full, "xti") == expected(name, 12_288, 16_384)


def test_every_layer_of_the_table_is_there_with_its_channels_heads_and_width(full, name):
    """The cross-attention layers of the U-Net in the order they run, with their channels, heads and widths."""
    channels = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320]
    heads = {"sd-1.4": {320: 8, 640: 8, 1280: 8}, "sd-2.1": {320: 5, 640: 10, 1280: 20}}[name]
    for block, c in zip(full.transformers.values(), channels, strict=True):
        attention: Any = block.transformer_blocks[0].attn2
        assert block.proj_out.weight.shape[:2] == (c, c)
        assert (attention.heads, attention.to_q.weight.shape[0]) == (heads[c], c)
        assert isinstance(block.proj_out, torch.nn.Conv2d if name == "sd-1.4" else torch.nn.Linear)
