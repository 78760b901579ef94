"""A tiny random IP-Adapter, in the layout of the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from personalize_core.base_model.model import BaseModel

WEIGHTS = "ip_adapter.safetensors"


def write_adapter(folder: Path, base: BaseModel, seed: int = 0) -> Path:
    """A random adapter for a base model, in the layout of the published one; its image encoder sees 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder: Any = CLIPVisionModelWithProjection
        encoder(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=12,
            )
        ).save_pretrained(folder / "image_encoder")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width = base.text_width
    weights = {
        "image_proj.proj.weight": random(4 * width, 12),
        "image_proj.proj.bias": random(4 * width),
        "image_proj.norm.weight": random(width),
        "image_proj.norm.bias": random(width),
    }
    paths = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    for index, path in enumerate(paths):  # both attentions of a block count, and only the second has any
        if path.endswith("attn2"):
            outputs = base.unet.get_submodule(path).get_submodule("to_k").weight.shape[0]
            for kind in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{index}.{kind}.weight"] = random(outputs, width) / width**0.5
    save_file(weights, folder / WEIGHTS)
    return folder
