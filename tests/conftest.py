"""A tiny random base model in Stable Diffusion's topology: convolutional projections as in 1.x, linear as in 2.x."""

from __future__ import annotations

# isort: off
import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch

# isort: on
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from personalize_core.base import BaseModel
from personalize_core.concept import Concept
from personalize_core.data import ConceptLatents

torch.set_num_threads(1)  # far faster on models this small

WORDS = "a photo of the sks dog teddy bear in desert on beach red mug jungle".split()


def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding with one merge chain a word, so that every word of WORDS is one token."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges, tokens = [], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            left, right = parts[-2], parts[-1]
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            parts[-2:] = [left + right]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *tokens, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )


def tiny_unet(linear: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=linear,
    )


def tiny_parts(linear: bool = False) -> dict:
    """The five components of a tiny Stable Diffusion, with random weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)  # CLIP's 0.02 would hide the words
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        unet = tiny_unet(linear)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "unet": unet, "scheduler": scheduler}


def tiny_base(linear: bool = False, **options) -> BaseModel:
    return BaseModel(name="tiny", revision="local", weights_hash="tiny", **tiny_parts(linear), **options)


@pytest.fixture(params=[False, True], ids=["convolutional", "linear"])
def base(request) -> BaseModel:
    return tiny_base(request.param)


@pytest.fixture
def concept() -> Concept:
    return Concept("v", "<v>", "dog")


@pytest.fixture
def images() -> ConceptLatents:
    generator = torch.Generator().manual_seed(1)

    def moments() -> torch.Tensor:
        mean = torch.randn(1, 4, 8, 8, generator=generator)
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return ConceptLatents([moments() for _ in range(3)], class_images=[moments() for _ in range(2)])


def predict(base: BaseModel, context) -> torch.Tensor:
    """The base model's answer to one fixed noisy latent per prompt, all rows with the same noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(len(context), -1, -1, -1)
    with torch.no_grad():
        return base.denoise(noise, torch.full((len(context),), 500), context)
