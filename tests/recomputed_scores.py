"""Every score again, from the files, by other means: open_clip, transformers, Pillow and NumPy, and nothing of ours.

tests/metrics/test_scores_recomputed.py compares. Written from the papers' definitions (Gal et al. 2022, Ruiz et al.
2023, Hessel et al. 2021), image by image and pair by pair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTModel


class OfText:
    """A folder of open_clip; how: (side, filter, mean, std), the shorter side to `side`, then the middle square."""

    def __init__(self, folder: Path, how: tuple[int, Any, float, float]) -> None:
        self.model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
        self.read, self.how = open_clip.get_tokenizer(f"local-dir:{folder}"), how

    def see(self, image: Image.Image) -> np.ndarray:
        side, resample, mean, std = self.how
        short = min(image.size)
        width, height = (side * length // short for length in image.size)
        image = image.resize((width, height), resample)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return unit(self.model.encode_image(normalised(image.crop((left, top, left + side, top + side)), mean, std)))

    def say(self, text: str) -> np.ndarray:
        return unit(self.model.encode_text(self.read([text])))


class OfIdentity:
    """A ViT of transformers, fed with images squashed to a square."""

    def __init__(self, folder: Path, how: tuple[int, Any, float, float]) -> None:
        # without the dtype: as the file has it, which for the mini encoder is half precision
        self.model, self.how = (
            ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval(),
            how,
        )

    def see(self, image: Image.Image) -> np.ndarray:
        side, resample, mean, std = self.how
        squashed = normalised(image.resize((side, side), resample), mean, std)
        return unit(self.model(pixel_values=squashed).last_hidden_state[:, 0])


class MiniSegmenter:
    """The mini segmenter's weights through plain functions."""

    def __init__(self, weights: Path) -> None:
        self.w = {name: tensor.float() for name, tensor in load_file(weights).items()}

    def mask(self, image: Image.Image) -> np.ndarray:
        x = seen = normalised(image.resize((64, 64), Image.Resampling.BICUBIC), 0.5, 0.5)
        kept = [F.relu(F.conv2d(x, self.w["stem.weight"], self.w["stem.bias"], 2, 2))]
        for level in range(3):
            kept.append(self.block(f"down.{level}", kept[-1], 2))
        x = kept.pop()
        for level in range(3):
            x = self.block(f"up.{level}", torch.cat([twice(x), kept.pop()], 1), 1)
        x = F.relu(F.conv2d(torch.cat([twice(x), seen], 1), self.w["fine.weight"], self.w["fine.bias"], 1, 1))
        x = F.conv2d(x, self.w["last.weight"], self.w["last.bias"], 1, 1)
        return np.asarray(F.interpolate(x, size=(image.height, image.width), mode="bilinear")[0, 0] > 0)

    def block(self, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        inner = self.normed(f"{name}.norms.0", F.conv2d(x, self.w[f"{name}.first.weight"], None, stride, 1)).relu()
        inner = self.normed(f"{name}.norms.1", F.conv2d(inner, self.w[f"{name}.second.weight"], None, 1, 1))
        return (inner + F.conv2d(x, self.w[f"{name}.skip.weight"], None, stride)).relu()

    def normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 8, self.w[f"{name}.weight"], self.w[f"{name}.bias"])


def twice(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def normalised(image: Image.Image, mean: float, std: float) -> torch.Tensor:
    values = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
    return torch.tensor(values.transpose(2, 0, 1)[None])


def unit(feature: torch.Tensor) -> np.ndarray:
    vector = feature.detach().numpy().astype(np.float64)[0]
    return vector / np.sqrt((vector**2).sum())


def greyed(image: Image.Image, mask: np.ndarray) -> Image.Image:
    pixels = np.array(image)
    pixels[~mask if mask.mean() >= 0.01 else np.ones_like(mask)] = 128
    return Image.fromarray(pixels)


@torch.no_grad()
def scores_of(
    grid: Path,
    concept: Path,
    noun: str,
    placeholder: str,
    of_text: dict[str, OfText],
    of_identity: dict[str, OfIdentity],
    segmenter: MiniSegmenter,
) -> tuple[dict[tuple[str, str, str], float], dict[str, float]]:
    """(metric, encoder, file name) -> score, of sampled and concept images; file name -> the mask's share."""
    found: dict[tuple[str, str, str], float] = {}
    shares: dict[str, float] = {}
    described = json.loads((grid / "grid.json").read_text())
    concept_images = sorted(concept.glob("*.png"))
    sampled = sorted(path for variant in described["variants"] for path in (grid / variant).glob("*.png"))
    whole, grey = {}, {}
    for path in [*sampled, *concept_images]:
        with Image.open(path) as opened:
            whole[path] = opened.convert("RGB")
        own = concept / "masks" / path.name
        if path in concept_images and own.is_file():
            with Image.open(own) as opened:
                mask = np.array(opened.convert("L")) > 127
        else:
            mask = segmenter.mask(whole[path])
        shares[path.relative_to(concept if path in concept_images else grid).as_posix()] = mask.sum() / mask.size
        grey[path] = greyed(whole[path], mask)

    for metric, encoders in (("clip_i", of_text), ("dino", of_identity)):
        for name, encoder in encoders.items():
            for suffix, images in (("", whole), ("_masked", grey)):
                seen = {path: encoder.see(image) for path, image in images.items()}
                for path in sampled:
                    cosines = [float((seen[path] * seen[other]).sum()) for other in concept_images]
                    key = (metric + suffix, name, path.relative_to(grid).as_posix())
                    found[key] = sum(cosines) / len(cosines)
                for path in concept_images:
                    cosines = [float((seen[path] * seen[other]).sum()) for other in concept_images if other != path]
                    found[metric + suffix, name, path.name] = sum(cosines) / len(cosines)
    for variant, slot in (("", noun), ("_slot_deleted", ""), ("_full_prompt", placeholder)):
        for name, encoder in of_text.items():
            for path in sampled:
                template = described["templates"][int(path.stem[:2])]
                cosine = float((encoder.see(whole[path]) * encoder.say(template.replace("{}", slot))).sum())
                place = path.relative_to(grid).as_posix()
                found[f"clip_t{variant}", name, place] = cosine
                found[f"clip_t{variant}_scaled", name, place] = 2.5 * max(cosine, 0.0)
    return found, shares
