"""The 16 transformers of a Stable Diffusion U-Net by their paths; no library is needed to read them."""

from __future__ import annotations

from typing import Literal

# In the order they run. Walking the modules would list the middle block last, because the U-Net registers its up
# blocks before it.
LAYERS = (
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
)

Pool = Literal["layer", "all"]
"""How statistics of attention maps are taken: of each layer by itself, or of all layers' values at once."""
