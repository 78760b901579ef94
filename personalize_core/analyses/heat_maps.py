"""Where an image's cross-attention looked for each word: DAAM (Tang et al. 2023, arXiv:2210.04885).

AttnDreamBooth shows such maps for each of its stages; CoRe does, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.layers import transformer_of
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.sampling.sampler import Sampler, denoiser

SIDE = 64  # of every map
COLOURS = (
    "Each map by itself, from where its word was attended to least, which shows the image alone, over blue, green and "
    "yellow to dark red, where it was attended to most. The colours of two maps do not compare."
)
THE_NOUN = "(the noun)"  # in the place of all words that stand for the concept
MIDDLE = "mid_block.attentions.0"  # DAAM passes over it: at the lowest resolution it looks everywhere


@dataclass(frozen=True)
class HeatMaps:
    """Of one image."""

    latents: Tensor  # (1, 4, h, w), the image's
    words: list[str]  # W, in the prompt's order, the concept's placeholder among them
    maps: Tensor  # (W, SIDE, SIDE) float32, at least 0: attention summed over steps, mean over layers and heads
    concept: list[int]  # which words are the placeholder
    class_noun: list[int]  # and which the class noun

    def shares(self) -> Tensor:
        """(W, SIDE, SIDE) in [0, 1]: each map from its own least to its own greatest value; a flat one is 0."""
        low, high = self.maps.amin(dim=(1, 2), keepdim=True), self.maps.amax(dim=(1, 2), keepdim=True)
        return (self.maps - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)

    def entropies(self) -> Tensor:
        """(W,) in [0, ln SIDE^2]: of each map as a distribution over places. Low: it looks at one place."""
        flat = self.maps.flatten(1).double()
        return torch.special.entr(flat / flat.sum(dim=1, keepdim=True).clamp(min=1e-300)).sum(dim=1)

    def overlap(self, first: int, second: int, threshold: float = 0.5) -> float:
        """Intersection over union of the places where two words' shares exceed the threshold."""
        one, other = (self.shares()[word] > threshold for word in (first, second))
        return float((one & other).sum() / (one | other).sum().clamp(min=1))


@torch.no_grad()
def heat_maps(
    method: Method, base: BaseModel, prompt: str, noise: Tensor, sampler: Sampler, steps: int, guidance: float
) -> HeatMaps:
    """Sample one image and watch.

    Args:
        prompt: as the method says it (`Method.say`).
        noise: (1, 4, h, w).
    """
    method.to(base.device).eval()
    seen: dict[str, Tensor] = {}

    def look(maps: AttentionMaps) -> None:
        for layer in base.layers:
            if transformer_of(layer) != MIDDLE:
                with_prompt = maps[layer][1]  # of the two halves of guidance; (heads, h*w, L)
                seen[layer] = seen[layer] + with_prompt if layer in seen else with_prompt

    with method.attach(base):
        latents = sampler(denoiser(method, base, [prompt], guidance, look), noise.to(base.device), steps)
    words = base.tokenizer.spelled(prompt, method.concept)
    columns = [positions for _, positions in words]
    tokens = base.tokenizer([prompt], method.concept)
    return HeatMaps(
        latents=latents,
        words=[word for word, _ in words],
        maps=torch.stack(_word_maps(list(seen.values()), columns)).cpu(),
        concept=[n for n, positions in enumerate(columns) if tokens.placeholder[0, positions].any()],
        class_noun=[n for n, positions in enumerate(columns) if tokens.class_noun[0, positions].all()],
    )


def _word_maps(layers: Sequence[Tensor], columns: Sequence[list[int]]) -> list[Tensor]:
    """A map (SIDE, SIDE) per word from each layer's attention (heads, h*w, L): the mean of its tokens' maps.

    Each token's map of each layer and head is enlarged on its own and cut off below 0, where bicubic interpolation
    overshoots; layers and heads count alike.
    """
    total = [torch.zeros(SIDE, SIDE, device=layers[0].device) for _ in columns]
    heads = sum(len(layer) for layer in layers)
    for layer in layers:
        side = isqrt(layer.shape[1])
        for word, positions in enumerate(columns):
            small = layer[:, :, positions].permute(0, 2, 1).unflatten(-1, (side, side))  # (heads, tokens, side, side)
            large = F.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(min=0)
            total[word] += large.mean(dim=1).sum(dim=0) / heads
    return total


def metrics(maps: HeatMaps) -> dict[str, Any]:
    """What is read off the maps, by word; and how far the concept's two words look at the same places."""
    entropies, means = maps.entropies().tolist(), maps.maps.mean(dim=(1, 2)).tolist()
    words = [
        {"word": word, "mean": mean, "entropy": entropy}
        for word, mean, entropy in zip(maps.words, means, entropies, strict=True)
    ]
    pairs = [(first, second) for first in maps.concept for second in maps.class_noun]
    overlaps = [maps.overlap(*pair) for pair in pairs]
    return {"words": words, "overlap of concept and class noun": overlaps[0] if overlaps else None}


def save_grid(found: Mapping[str, HeatMaps], images: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """A row per variant: its image, (H, W, 3) uint8, and that image under each word's map."""
    rows = {}
    for name, maps in found.items():
        image = Image.fromarray(images[name])
        rows[in_words(name)] = [[image], *([overlay(image, share)] for share in maps.shares())]
    comparison_grid([], rows, ["the image", *next(iter(found.values())).words], path, title, note=COLOURS)


def with_one_slot(maps: HeatMaps, before: int, behind: int) -> HeatMaps:
    """The same with all words that stand for the concept as one, so that prompts that name it otherwise compare.

    Args:
        before, behind: how many words the prompt has before the concept, and behind it.
    """
    end = len(maps.words) - behind
    return replace(
        maps,
        words=[*maps.words[:before], THE_NOUN, *maps.words[end:]],
        maps=torch.cat([maps.maps[:before], maps.maps[before:end].sum(dim=0, keepdim=True), maps.maps[end:]]),
        concept=[before],
        class_noun=[before],
    )


def overlay(image: Image.Image, share: Tensor, side: int = 256) -> Image.Image:
    """The image over its heat map in jet's colours, the more transparent the hotter, as DAAM shows it.

    Args:
        share: (SIDE, SIDE) in [0, 1], as of `HeatMaps.shares`.
        side: pixels of what comes back.
    """
    enlarged = F.interpolate(share[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0]
    heat = enlarged.clamp(0, 1).numpy()
    below = colormaps["jet"](heat)[..., :3]
    above = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)) / 255
    blended = heat[..., None] * below + (1 - heat[..., None]) * above
    return Image.fromarray((blended * 255).round().astype(np.uint8))
