"""How an image is prepared before an encoder or a segmenter sees it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from personalize_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

THREADS = min(8, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else min(8, os.cpu_count() or 1)
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """An image of any size to (3, crop, crop)."""

    size: int  # pixels; the shorter side after resizing
    crop: int  # pixels; the central square that is kept
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False  # both sides become `size`, whatever the image's shape
    # Where the crop begins if the margins cannot be equal: torchvision, and open_clip with it, round to the even pixel,
    # transformers' processors round down.
    crop_rounds_down: bool = False
    scaled_first: bool = False  # values become numbers in [0, 1] before the resizing, which is torch's

    def __str__(self) -> str:
        resize = f"both sides to {self.size}" if self.squash else f"shorter side to {self.size}"
        resize = f"{resize}, {self.interpolation}"
        crop = f"centre crop {self.crop}{', its corner rounded down' if self.crop_rounds_down else ''}"
        parts = [resize, crop, "values in [0, 1]"]
        if self.scaled_first:
            parts = ["values in [0, 1]", f"{resize} with antialiasing, in float32 by torch", crop]
        return f"RGB; {'; '.join(parts)}; mean {list(self.mean)}; std {list(self.std)}"

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Images to (N, 3, crop, crop). Resizing is Pillow's, on 8-bit values, as in most of the original tools."""
        import torch  # not at the top: which preprocessing a published encoder has is asked without computing features

        pixels = np.stack([self._square(image) for image in images])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        x = x if self.scaled_first else x.div_(255)
        return x.sub_(torch.tensor(self.mean).view(3, 1, 1)).div_(torch.tensor(self.std).view(3, 1, 1))

    def _square(self, image: Image.Image) -> np.ndarray:
        """(crop, crop, 3): uint8, or float32 in [0, 1] if they are `scaled_first`."""
        image = image.convert("RGB")
        width, height = image.size
        if self.squash:
            width = height = self.size
        else:
            short = min(width, height)
            width, height = self.size * width // short, self.size * height // short
        margins = (width - self.crop, height - self.crop)
        left, top = (each // 2 if self.crop_rounds_down else round(each / 2) for each in margins)
        if self.scaled_first:
            pixels = _resized_by_torch(np.asarray(image), (height, width), self.interpolation)
            return pixels[top : top + self.crop, left : left + self.crop]
        image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


def _resized_by_torch(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3) float32 in [0, 1]. What Pillow computes in double precision differs by 1e-5."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255  # a copy: what Pillow lends is read-only
    x = F.interpolate(x, size=size, mode=interpolation, align_corners=False, antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def in_threads(function: Callable[[Any], Any], items: Iterable) -> Iterable:
    """As map, in order, but in several threads: Pillow reads and resizes without holding Python's lock."""
    items = list(items)
    if len(items) == 1 or THREADS == 1:
        return map(function, items)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


CLIP_PREPROCESSING = Preprocessing(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def preprocessing_of_open_clip(folder: Path, image_size: int | tuple[int, int]) -> Preprocessing:
    """As open_clip would prepare an image for scoring: its defaults, overlaid by the folder's own."""
    own = json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})
    side = image_size if isinstance(image_size, int) else image_size[0]
    resize_mode, interpolation = own.get("resize_mode", "shortest"), own.get("interpolation", "bicubic")
    if resize_mode not in ("shortest", "squash") or interpolation not in INTERPOLATIONS:
        raise InputError(
            f"{folder / 'open_clip_config.json'} asks for resize_mode {resize_mode!r} and interpolation "
            f"{interpolation!r}: only 'shortest' or 'squash', and {', '.join(INTERPOLATIONS)} are known here"
        )
    return Preprocessing(
        side,
        side,
        tuple(own.get("mean", CLIP_PREPROCESSING.mean)),
        tuple(own.get("std", CLIP_PREPROCESSING.std)),
        interpolation,
        squash=resize_mode == "squash",
    )


def preprocessing_of_transformers(folder: Path, image_size: int) -> Preprocessing:
    """As transformers' image processors of the ViT family would prepare an image, from its preprocessor_config.json.

    Where a processor has two implementations, this is the one on Pillow. DINOv3's has one, which scales values before
    it resizes.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(f"{folder} does not hold preprocessor_config.json, which says how to prepare an image")
    own = json.loads(path.read_text())
    size = own.get("size", image_size)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    side = shortest or (size["height"] if isinstance(size, dict) else size)
    crop = own.get("crop_size") if own.get("do_center_crop") else None
    crop = crop["height"] if isinstance(crop, dict) else crop
    interpolation = {int(filter): name for name, filter in INTERPOLATIONS.items()}.get(own.get("resample", 2))
    if interpolation is None or abs(own.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise InputError(f"{path} asks for a resampling or rescaling that is not known here")
    return Preprocessing(
        side,
        crop or (image_size if shortest else side),
        tuple(own["image_mean"]),
        tuple(own["image_std"]),
        interpolation,
        squash=shortest is None,
        crop_rounds_down=shortest is not None,
        scaled_first=own.get("image_processor_type", "").startswith("DINOv3ViT"),
    )
