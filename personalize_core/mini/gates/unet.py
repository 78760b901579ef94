"""Whether the U-Net predicts better under the true words than under others."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from personalize_core.mini.diffusion import encoded, judged_pairs, judged_scenes, swap_table
from personalize_core.mini.gates.thresholds import Figures


def unet_gate(model: StableDiffusionPipeline, count: int = 300) -> tuple[Figures, str]:
    rendered = judged_scenes(count)
    table = swap_table(model.tokenizer, model.text_encoder, model.unet, rendered, encoded(model.vae, rendered))
    pairs = judged_pairs(count)
    table |= swap_table(model.tokenizer, model.text_encoder, model.unet, pairs, encoded(model.vae, pairs), ("beside",))
    figures = {f"{aspect}: {figure}": value for aspect, row in table.items() for figure, value in row.items()}
    return figures, f"{count} fresh scenes and as many of two things, 4 draws of noise each"
