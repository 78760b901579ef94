"""Foreground masks for the masked scores: which pixels show the concept, and grey for the others.

CoRe (Wu et al. 2024) removes the background before it measures identity, so that copying the background of a concept
image earns nothing; it does not say how. Here: masks that come with the concept, for its concept images, else a
segmenter; constant mid grey; no crop. A mask of less than `tables.EMPTY` of its image is empty: the concept is absent,
and all of the image becomes grey. It is counted, never left out, or a missing concept would be rewarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from personalize_core.concepts.masks import Mask
from personalize_core.errors import InputError
from personalize_core.files.stamps import sha256
from personalize_core.metrics import weights as published
from personalize_core.metrics.encoder_names import MINI_OF, MINI_WEIGHTS, find
from personalize_core.metrics.encoders import BATCH_SIZE, of_transformers
from personalize_core.metrics.preprocessing import Preprocessing, preprocessing_of_transformers
from personalize_core.metrics.tables import EMPTY
from personalize_core.metrics.weights import SEGMENTERS

GREY = 128
_ASKING = Lock()  # tokenizers of transformers refuse to be used by two threads at once


class Segmenter(Protocol):
    """Finds the concept in any image."""

    @property
    def name(self) -> str: ...

    @property
    def weights_hash(self) -> str:
        """sha256 of the weights file."""
        ...

    @property
    def preprocessing(self) -> str:
        """What happens to an image before the network sees it, and what is asked for, in words."""
        ...

    def masks(self, images: Sequence[Image.Image], class_noun: str) -> list[Mask]: ...


class Block(nn.Module):
    """Two convolutions and a shortcut; the first convolution halves the sides if `stride` is 2."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, outside) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.skip(x))


class MiniNetwork(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of 0.2 M parameters. It is trained in mini/segmenter.py."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, 2, 2)
        self.down = nn.ModuleList([Block(16, 32, 2), Block(32, 64, 2), Block(64, 64, 2)])
        self.up = nn.ModuleList([Block(64 + 64, 32), Block(32 + 32, 24), Block(24 + 16, 16)])
        self.fine = nn.Conv2d(16 + 3, 12, 3, 1, 1)
        self.last = nn.Conv2d(12, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64), -1 to 1, to logits (B, 1, 64, 64): is there a thing?"""
        image, levels = x, [F.relu(self.stem(x))]
        for block in self.down:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat([_doubled(x), levels.pop()], dim=1))
        return self.last(F.relu(self.fine(torch.cat([_doubled(x), image], dim=1))))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class MiniSegmenter:
    """The mini world's own: it finds whatever thing stands in the scene, and is asked for nothing."""

    weights_hash: str
    network: torch.nn.Module
    device: str
    name: str = "mini-segmenter"
    preprocessing: str = "RGB; both sides to 64, bicubic; the thing in the scene, whatever it is; probability above 0.5"

    def masks(self, images: Sequence[Image.Image], class_noun: str) -> list[Mask]:
        return _in_batches(lambda some: self.network(self._prepared(some).to(self.device))[:, 0], images)

    def _prepared(self, images: Sequence[Image.Image]) -> Tensor:
        return Preprocessing(64, 64, (0.5,) * 3, (0.5,) * 3, "bicubic", squash=True)(images)


@dataclass(frozen=True)
class ClipSeg:
    """CLIPSeg of transformers, queried with the class noun."""

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    tokenizer: Any
    device: str

    @property
    def preprocessing(self) -> str:
        return f"{self.prepare}; the class noun as the query; probability above 0.5"

    def masks(self, images: Sequence[Image.Image], class_noun: str) -> list[Mask]:
        with _ASKING:
            query = self.tokenizer([class_noun], return_tensors="pt", truncation=True).to(self.device)

        def logits(some: Sequence[Image.Image]) -> Tensor:
            words = {name: query[name].expand(len(some), -1) for name in ("input_ids", "attention_mask")}
            found = self.model(pixel_values=self.prepare(some).to(self.device), **words).logits
            return found.view(len(some), *found.shape[-2:])  # the library drops the first axis of one image

        return _in_batches(logits, images)


@torch.inference_mode()
def _in_batches(logits: Any, images: Sequence[Image.Image]) -> list[Mask]:
    """(B, h, w) logits of a few images at a time, as masks of each image's own size."""
    found: list[Mask] = []
    for start in range(0, len(images), BATCH_SIZE):
        some = images[start : start + BATCH_SIZE]
        maps = logits(some).float().cpu()
        for image, one in zip(some, maps, strict=True):
            size = (image.height, image.width)
            if one.shape != size:
                one = F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            found.append((one > 0).numpy())
    return found


def load_segmenter(name_or_folder: str, device: str = "cpu") -> Segmenter:
    """What finds the concept in images that no mask came with.

    Args:
        name_or_folder: "mini-segmenter", which comes with this package; "clipseg", fetched from the hub;
            "clipseg:PATH", the same from a local folder; or a folder with a CLIPSegForImageSegmentation that
            transformers wrote.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "segmenter")
    if name == MINI_OF["segmenter"]:
        from safetensors.torch import load_file

        weights, network = published.the_weights(MINI_WEIGHTS / "segmenter", ("model.safetensors",)), MiniNetwork()
        tensors = {key: tensor.float() for key, tensor in load_file(weights).items()}
        published.readable(name, weights, lambda: network.load_state_dict(tensors))
        return MiniSegmenter(sha256(weights), network.eval().requires_grad_(False).to(device), device)

    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    if path is None:
        path = published.fetched(name, SEGMENTERS[name])
    folder = published.existing_folder(name, path, "config.json")
    weights = published.the_weights(folder, ("model.safetensors",))
    model = of_transformers(name, CLIPSegForImageSegmentation, folder, weights)
    prepare = preprocessing_of_transformers(folder, model.config.vision_config.image_size)
    if not prepare.squash:
        raise InputError(f"{folder / 'preprocessor_config.json'} asks for a crop, where a mask of all is wanted")
    tokenizer = published.readable(name, folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    squashed = replace(prepare, crop=prepare.size)
    return ClipSeg(name, sha256(weights), squashed, model.to(device), tokenizer, device)


def rule(segmenter: Segmenter) -> str:
    """The mask rule, in words, for every masked score."""
    return (
        f"grey {GREY} but for the concept, no crop; concept images by masks that came with them, if any, else, as "
        f"sampled images, by {segmenter.name} ({segmenter.weights_hash}: {segmenter.preprocessing})"
    )


def share(mask: Mask) -> float:
    """Of the image, in [0, 1]."""
    return float(mask.mean())


def composite(image: Image.Image, mask: Mask) -> Image.Image:
    """The image, mid grey where it does not show the concept; all grey where the mask is empty."""
    pixels = np.asarray(image.convert("RGB"))
    shown = mask if share(mask) >= EMPTY else np.zeros_like(mask)
    return Image.fromarray(np.where(shown[..., None], pixels, np.uint8(GREY)))
