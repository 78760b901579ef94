"""What can be said of cross-attention layers without a base model; no library is needed to read it."""

from __future__ import annotations

from typing import Literal

STABLE_DIFFUSION_LAYERS = 16  # cross-attention layers of a U-Net of Stable Diffusion 1.x and 2.x

IN_TRANSFORMER = ".transformer_blocks."  # between the path of a transformer and the number of a block in it

Pool = Literal["layer", "all"]
"""How statistics of attention maps are taken: of each layer by itself, or of all layers' values at once."""


def transformer_of(layer: str) -> str:
    """The path of the transformer that a cross-attention layer is in: layers of one look at the same locations."""
    return layer.partition(IN_TRANSFORMER)[0]
