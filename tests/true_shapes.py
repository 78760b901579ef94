"""Stable Diffusion 1.4, 2.1-base and 2.1 in their true shapes: what the config.json of each published part says."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import tiny_tokenizer

# As far as they differ from the libraries' defaults.
_UNET_2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET: dict[str, dict[str, Any]] = {
    "sd-1.4": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1-base": {"sample_size": 64, **_UNET_2},
    "sd-2.1": {"sample_size": 96, **_UNET_2},
}
_TEXT_2: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
TEXT: dict[str, dict[str, Any]] = {
    "sd-1.4": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "sd-2.1-base": _TEXT_2,
    "sd-2.1": _TEXT_2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
PREDICTION: dict[str, Any] = {"sd-1.4": "epsilon", "sd-2.1-base": "epsilon", "sd-2.1": "v_prediction"}


def true_parts(name: str) -> dict[str, Any]:
    """The five components, without weights: on torch's meta device. Words are tokens, as of tests' tiny models."""
    kinds: Any = {"text": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
    with torch.device("meta"):
        text_encoder = kinds["text"](CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **TEXT[name]))
        vae, unet = kinds["vae"](**VAE), kinds["unet"](**UNET[name])
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=PREDICTION[name],
    )
    parts = {"text_encoder": text_encoder, "vae": vae, "unet": unet, "scheduler": scheduler}
    return {"tokenizer": tiny_tokenizer(), **parts}
