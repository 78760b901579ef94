"""Stable Diffusion 1.4, 2.1-base, 2.1 and XL in their true shapes: what the config.json of each published part says."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
    "sdxl-base-1.0": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_TEXT_2: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_TEXT_1: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
TEXT: dict[str, dict[str, Any]] = {
    "sd-1.4": _TEXT_1,
    "sd-2.1-base": _TEXT_2,
    "sd-2.1": _TEXT_2,
    "sdxl-base-1.0": _TEXT_1,
}
SECOND_TEXT: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SCALING: dict[str, float] = {"sdxl-base-1.0": 0.13025}  # of latents, where it is not the default
PREDICTION: dict[str, Any] = {
    "sd-1.4": "epsilon",
    "sd-2.1-base": "epsilon",
    "sd-2.1": "v_prediction",
    "sdxl-base-1.0": "epsilon",
}


def true_parts(name: str) -> dict[str, Any]:
    """The components, without weights: on torch's meta device. Words are tokens, as of tests' tiny models."""
    kinds: Any = {
        "text": CLIPTextModel,
        "second": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
    }
    more: dict[str, Any] = {}
    with torch.device("meta"):
        text_encoder = kinds["text"](CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **TEXT[name]))
        scaling = {"scaling_factor": SCALING[name]} if name in SCALING else {}
        vae, unet = kinds["vae"](**VAE, **scaling), kinds["unet"](**UNET[name])
        if name == "sdxl-base-1.0":
            config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **SECOND_TEXT)
            more = {"text_encoder_2": kinds["second"](config), "tokenizer_2": tiny_tokenizer(pad_token="!")}
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=PREDICTION[name],
    )
    parts = {"text_encoder": text_encoder, "vae": vae, "unet": unet, "scheduler": scheduler}
    return {"tokenizer": tiny_tokenizer(), **parts, **more}
