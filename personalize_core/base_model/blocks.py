"""The transformer blocks of a U-Net as it is loaded: which there are, where, and in which order they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import Transformer2DModel
from torch import nn

from personalize_core.base_model.layers import IN_TRANSFORMER


@dataclass(frozen=True)
class Block:
    """One transformer block, with one self-attention, one cross-attention and one feed-forward layer."""

    layer: str  # what its cross-attention layer is called, in attention maps, logs and files
    path: str  # in the U-Net
    transformer: str  # the path of the transformer that it is a part of
    module: Any  # diffusers' BasicTransformerBlock


def transformers_in_order(unet: nn.Module) -> dict[str, Any]:
    """Path -> Transformer2DModel, in the order they run.

    Walking the modules would list the middle block last, because a U-Net registers its up blocks before it.
    """
    found = {path: module for path, module in unet.named_modules() if isinstance(module, Transformer2DModel)}
    parts = ("down_blocks", "mid_block", "up_blocks")
    return {path: module for part in parts for path, module in found.items() if path.startswith(f"{part}.")}


def blocks_in_order(transformers: Mapping[str, Any]) -> dict[str, Block]:
    """Cross-attention layer -> its block, in the order they run.

    A layer is called after its transformer where that has no other, as all of Stable Diffusion 1 and 2; else after its
    block.
    """
    found = {}
    for transformer, module in transformers.items():
        alone = len(module.transformer_blocks) == 1
        for number, block in enumerate(module.transformer_blocks):
            path = f"{transformer}{IN_TRANSFORMER}{number}"
            layer = transformer if alone else path
            found[layer] = Block(layer, path, transformer, block)
    return found
