"""Photographs become latents, and latents become training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Generator, Tensor

from personalize_core.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
CROPS = 5  # positions that stand for the random crop of a picture that is not square


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes square training images (methods.md 0.7).

    Latents are made once and cached, so the random choices of training are enumerated here: a random crop
    becomes `CROPS` evenly spaced positions along the longer side, a random flip becomes two images. Deviates
    from the papers only in that: any of their crops lies within an eighth of the slack from one of ours.
    """

    geometry: str  # "squash": straight to a square; "crop": shorter side to size, then a square crop
    interpolation: str  # "bicubic" or "bilinear"
    flip: bool  # half of the rows are mirrored

    @property
    def key(self) -> str:
        """Names the cached file."""
        return f"{self.geometry}-{self.interpolation}" + ("-flip" if self.flip else "")

    def views(self, picture: Image.Image, size: int) -> list[Image.Image]:
        """Every image that training may draw for one RGB photograph; all (size, size)."""
        resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[self.interpolation]
        if self.geometry == "squash":
            views = [picture.resize((size, size), resample)]
        else:
            width, height = picture.size
            scale = size / min(width, height)
            resized = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), resample)
            slack_x, slack_y = resized.width - size, resized.height - size
            corners = sorted(
                {(round(slack_x * k / (CROPS - 1)), round(slack_y * k / (CROPS - 1))) for k in range(CROPS)}
            )
            views = [resized.crop((x, y, x + size, y + size)) for x, y in corners]
        return views + [ImageOps.mirror(view) for view in views] if self.flip else views


CENTRE_CROP = Preprocessing("crop", "bicubic", flip=False)  # what reference pictures are shown and compared in


def load_picture(path: Path) -> Image.Image:
    """The photograph as RGB, upright by its EXIF orientation.

    Raises:
        InputError: the file is missing, empty, damaged or no picture.
    """
    try:
        with Image.open(path) as opened:
            return _as_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "is empty" if path.is_file() and path.stat().st_size == 0 else "cannot be read as a picture"
        raise InputError(f"{path} {what} ({type(error).__name__}); replace it or take it out of the folder") from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Where a picture is transparent it becomes white, as viewers show it; sixteen bits become eight."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))  # Pillow would cut all at 255
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """The pictures of a folder by their names' endings, sorted; hidden files and subfolders are not looked at."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def to_pixels(views: Sequence[Image.Image]) -> Tensor:
    """Square RGB images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(view, dtype=np.float32) for view in views])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, resized."""
    views = CENTRE_CROP.views(picture, size)
    return views[len(views) // 2]


class ConceptLatents:
    """Latents to train on, as the autoencoder's moments: drawn from anew in every step, not frozen once.

    Args:
        concept: per photograph, the moments (V, 2, 4, h, w) of its V views: mean and deviation, scaled as the
            U-Net expects.
        class_images: the same for pictures of the class noun, where a method asks for them.
    """

    def __init__(self, concept: Sequence[Tensor], class_images: Sequence[Tensor] = ()) -> None:
        self.concept, self.class_images = list(concept), list(class_images)

    def __len__(self) -> int:
        return len(self.concept)

    def instances(self, size: int, generator: Generator) -> Tensor:
        """(size, 4, h, w): photographs of the concept, none twice before all have been drawn once."""
        return _draw(self.concept, size, generator)

    def prior(self, size: int, generator: Generator) -> Tensor:
        """(size, 4, h, w): pictures of the class noun."""
        if not self.class_images:
            raise ValueError("these latents hold no class images; the method has to ask for them in `class_images`")
        return _draw(self.class_images, size, generator)


def _draw(pictures: Sequence[Tensor], size: int, generator: Generator) -> Tensor:
    rounds = -(-size // len(pictures))
    order = torch.cat([torch.randperm(len(pictures), generator=generator) for _ in range(rounds)])[:size]
    rows = []
    for index in order.tolist():
        views = pictures[index]
        mean, deviation = views[int(torch.randint(len(views), (), generator=generator))]
        rows.append(mean + deviation * torch.randn(mean.shape, generator=generator))
    return torch.stack(rows)
