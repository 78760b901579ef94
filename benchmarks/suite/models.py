"""Base models to measure on: the miniature, and random weights at the shapes of Stable Diffusion, which need no hub."""

from __future__ import annotations

import copy
import gzip
from dataclasses import dataclass
from typing import Any, Literal

import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch

# isort: split
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from personalize_core.base_model.loading import MINI
from personalize_core.base_model.model import BaseModel

Size = Literal["tiny", "mini", "sd-1.4", "sd-2.1-base"]
Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The config.json of the published repositories, as far as it differs from the libraries' defaults; and a tiny model
# with every kind of layer.
_UNET: dict[Size, dict[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "sd-1.4": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1-base": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}
_TEXT: dict[Size, tuple[int, int, int, str]] = {  # width, layers, heads, activation; a layer is 4 times as wide inside
    "tiny": (32, 2, 4, "quick_gelu"),
    "sd-1.4": (768, 12, 12, "quick_gelu"),
    "sd-2.1-base": (1024, 23, 16, "gelu"),
}
_VAE_TINY, _VAE = (8, 16), (128, 256, 512, 512)


@dataclass
class Stock:
    """The five parts of a Stable Diffusion as diffusers and transformers make them, all in float32 on the CPU."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler: Any

    def copied(self) -> Stock:
        """The same weights again, for whoever changes them."""
        return copy.deepcopy(self)

    def base_model(self, name: str, device: str, precision: Precision) -> BaseModel:
        """This project's base model of these very parts, which are not to be used otherwise from now on."""
        return BaseModel(
            name=name,
            revision="local",
            weights_hash=name,
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            unet=self.unet,
            scheduler=self.scheduler,
            device=device,
            dtype=DTYPES[precision],
        )

    def pipeline(self, device: str, precision: Precision) -> Any:
        """The stock pipeline of these parts, wholly in that precision as its documentation advises, with DDIM."""
        pipeline: Any = StableDiffusionPipeline
        pipe = pipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device)
        if precision != "fp32":
            pipe.to(DTYPES[precision])
        pipe.set_progress_bar_config(disable=True)
        return pipe


def stock(size: Size) -> Stock:
    """A Stable Diffusion of that size; equal sizes have equal weights."""
    return _miniature() if size == "mini" else _random(size)


def _miniature() -> Stock:
    text_encoder: Any = CLIPTextModel
    return Stock(
        tokenizer=CLIPTokenizer.from_pretrained(MINI / "tokenizer"),
        text_encoder=text_encoder.from_pretrained(MINI / "text_encoder", dtype=torch.float32),
        vae=AutoencoderKL.from_pretrained(MINI / "vae", torch_dtype=torch.float32),
        unet=UNet2DConditionModel.from_pretrained(MINI / "unet", torch_dtype=torch.float32),
        scheduler=DDPMScheduler.from_pretrained(MINI / "scheduler"),
    )


def _random(size: Size) -> Stock:
    kinds: Any = {"text": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
    width, layers, heads, activation = _TEXT[size]
    channels = _VAE_TINY if size == "tiny" else _VAE
    tokenizer: Any = _tokenizer(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = kinds["text"](
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                hidden_act=activation,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = kinds["vae"](
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=1 if size == "tiny" else 2,
            latent_channels=4,
            norm_num_groups=4 if size == "tiny" else 32,
        )
        unet = kinds["unet"](**_UNET[size])
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )
    return Stock(tokenizer, text_encoder.eval(), vae.eval(), unet.eval(), scheduler)


def _tokenizer(size: Size) -> CLIPTokenizer:
    """The miniature's for a tiny model, which then learns of 1,226 embeddings instead of 49,408."""
    if size == "tiny":
        return CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    return clip_tokenizer("!" if size == "sd-2.1-base" else "<|endoftext|>")


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's own, of 49,408 entries, from the merges that open_clip brings."""
    with gzip.open(default_bpe()) as file:
        lines = file.read().decode().split("\n")
    letters = list(bytes_to_unicode().values())
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    count = 49_408 - len(entries) - 2  # without the two marks of a text's begin and end
    merges: list[Any] = [tuple(line.split()) for line in lines[1 : count + 1]]  # the first line says its version
    entries += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)
