"""The shapes of every network of the miniature."""

from __future__ import annotations

from copy import deepcopy

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

TEXT_WIDTH = 128


def autoencoder() -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 4. Three levels where SD 1.x has four: its 64 pixels would become 8 x 8 x 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    """CLIP's text transformer; `end` is the id of the end token, the highest of the vocabulary."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def unet() -> UNet2DConditionModel:
    """SD 1.x's topology, 16 cross-attention layers, on 16 x 16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        attention_head_dim=(
            1,
            2,
            4,
            4,
        ),  # diffusers' name for the number of heads: 32 channels each, 28 % faster than 4
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def identity() -> ViTModel:
    """64 x 64 x 3 to a class token of width 128, read after the last norm."""
    config = ViTConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    return ViTModel(config, add_pooling_layer=False)


# open_clip's own vocabulary of shapes: a small residual network that sees, a small transformer that reads.
CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 0, "width": 128, "heads": 4, "layers": 2},
}


class Average(nn.Module):
    """An exponential moving average of a network's weights, in a copy that is never trained."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, longest: float = 0.999) -> None:
        decay = min(longest, (1 + step) / (10 + step))
        averages, values = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(value)


def to_tensor(images) -> Tensor:
    """(B, h, w, 3) uint8 array to (B, 3, h, w) float32 in -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_images(tensor: Tensor):
    """The way back: (B, h, w, 3) uint8 array."""
    return (tensor.detach().cpu().float().clamp(-1, 1) + 1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
