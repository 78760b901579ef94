"""A U-Net with several blocks in a transformer: its blocks are found as they are, and in the order they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.layers import transformer_of
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.shared.layer_modules import attention_projections
from tests.conftest import tiny_parts

LAYERS = [
    "down_blocks.0.attentions.0",
    *(f"down_blocks.1.attentions.0.transformer_blocks.{number}" for number in range(3)),
    *(f"mid_block.attentions.0.transformer_blocks.{number}" for number in range(3)),
    *(f"up_blocks.0.attentions.{transformer}.transformer_blocks.{n}" for transformer in range(2) for n in range(3)),
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]


@pytest.fixture(scope="module")
def deep() -> BaseModel:
    """As in Stable Diffusion XL, the lower a resolution, the more blocks its transformers have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            transformer_layers_per_block=(1, 3),  # type: ignore[arg-type]  # diffusers allows it, its annotation does not
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
            use_linear_projection=True,
        )
    parts: dict[str, Any] = tiny_parts() | {"unet": unet}
    return BaseModel(name="deep", revision="local", weights_hash="deep", **parts)


def denoised(base: BaseModel, maps: AttentionMaps | None = None) -> torch.Tensor:
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return base.denoise(x_t, torch.tensor([500]), base.encode(["a photo of a dog"]), maps)


def test_every_block_is_a_layer_called_after_its_transformer_where_that_has_one(deep):
    assert list(deep.layers) == LAYERS
    assert [block.path for block in deep.blocks_of(["down_blocks.0.attentions.0"])] == [
        "down_blocks.0.attentions.0.transformer_blocks.0"
    ]
    for layer, block in deep.blocks.items():
        assert block.layer == layer and transformer_of(layer) == block.transformer
        assert deep.unet.get_submodule(block.path) is block.module


def test_the_layers_run_and_are_recorded_in_that_order(deep):
    ran: list[Any] = []
    by_module = {block.module: layer for layer, block in deep.blocks.items()}
    handles = [module.register_forward_hook(lambda block, *call: ran.append(by_module[block])) for module in by_module]
    maps = AttentionMaps()
    try:
        denoised(deep, maps)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(maps) == LAYERS
    assert [block.module.attn2.processor.index for block in deep.blocks.values()] == list(range(len(LAYERS)))


def test_maps_of_a_transformer_are_the_mean_of_its_layers_and_stay_until_another_runs(deep):
    maps, tokens = AttentionMaps(), torch.zeros(1, 77, dtype=torch.bool)
    tokens[0, 2:4] = True
    denoised(deep, maps)
    expected = sum(maps[layer][..., 2:4].sum(-1).mean(1) for layer in LAYERS[1:4]) / 3
    torch.testing.assert_close(maps.on_within("down_blocks.1.attentions.0", tokens), expected)
    assert torch.equal(maps.on_within(LAYERS[0], tokens), maps.on(LAYERS[0], tokens))

    latest, kept = AttentionMaps(latest_only=True), {}
    handles = [
        transformer.register_forward_hook(lambda module, args, output, path=path: kept.update({path: list(latest)}))
        for path, transformer in deep.transformers.items()
    ]
    try:
        denoised(deep, latest)
    finally:
        for handle in handles:
            handle.remove()
    assert kept == {path: [layer for layer in LAYERS if transformer_of(layer) == path] for path in deep.transformers}


def test_projections_are_those_of_all_attention_layers_of_diffusers_own_list(deep):
    stock = {name.removesuffix(".processor") for name in deep.unet.attn_processors}
    found = {path.rpartition(".to_")[0] for path in attention_projections(deep)}
    assert found == stock and len(attention_projections(deep)) == 4 * len(stock)


def test_compiled_blocks_are_all_blocks(deep):
    expected = denoised(deep)
    deep.compiles = True
    try:
        with deep.compiled("eager"):
            assert torch.equal(denoised(deep), expected)
            assert deep._compiled and len(deep._compiled._forwards) == len(LAYERS)
    finally:
        deep.compiles = False
