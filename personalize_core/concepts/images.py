"""Concept images become views, views become latents, and latents become batch items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from personalize_core.concepts.preprocessing import CENTRE_CROP, Preprocessing

CROPS = 5  # positions that stand for the random crop of an image that is not square
ROTATIONS = 32  # images that stand for a random rotation
ZOOMS = 60  # images that stand for a random zoom
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1  # steps by which places are spread evenly


@dataclass(frozen=True)
class View:
    """A square of an image, and what was cut off beside it: pixels, counted at the size it is shown in."""

    shown: Image.Image
    original: tuple[int, int]  # width and height of what was resized
    left: int = 0
    top: int = 0
    right: int = 0

    @property
    def mirrored(self) -> View:
        return View(ImageOps.mirror(self.shown), self.original, self.right, self.top, self.left)

    def resized(self, side: int, resample: Image.Resampling) -> View:
        left, top, right = (round(cut * side / self.shown.width) for cut in (self.left, self.top, self.right))
        return View(self.shown.resize((side, side), resample), self.original, left, top, right)

    @property
    def sizes(self) -> list[int]:
        """A row of `TextContext.sizes`."""
        (width, height), size = self.original, self.shown.width
        return [height, width, self.top, self.left, size, size]


def views_of(recipe: Preprocessing, image: Image.Image, size: int) -> list[Image.Image]:
    """Every training image that one RGB concept image may become; all (size, size), equally likely."""
    return [view.shown for view in sized_views_of(recipe, image, size)]


def sized_views_of(recipe: Preprocessing, image: Image.Image, size: int) -> list[View]:
    """The same, each with what Stable Diffusion XL is told of it: see docs/base_models.md#image-sizes-in-training."""
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[recipe.interpolation]
    match recipe.geometry:
        case "rotate":
            return _rotated(recipe, image, size, resample)
        case "zoom":
            middle = _middle_square(image)
            return [zoom.view(middle, size, resample, recipe.flip) for zoom in zooms(size)]
        case "squash":
            views = [View(image.resize((size, size), resample), image.size)]
        case "centre":
            views = [_middle_square(image).resized(size, resample)]
        case "crop":
            resized = _shorter_side_to(size, image, resample)
            views = [_crop(resized, size, corner, image.size) for corner in _corners(resized, size)]
    return views + [view.mirrored for view in views] if recipe.flip else views


def _rotated(recipe: Preprocessing, image: Image.Image, size: int, resample: Image.Resampling) -> list[View]:
    """As torchvision's RandomRotation(45, expand=True) with probability 0.75, Resize, flip 0.25, RandomCrop."""
    views, angles = [], iter(np.linspace(-45, 45, ROTATIONS * 3 // 2 + 1)[1::2].tolist())  # middles of 24 parts
    for k in range(ROTATIONS):
        turned = image if k % 4 == 0 else image.rotate(next(angles), expand=True)
        resized, place = _shorter_side_to(size, turned, resample), _spread(k, GOLDEN)
        view = _crop(resized, size, _place(resized, size, place), turned.size)
        views.append(view.mirrored if recipe.flip and k // 4 % 4 == 3 else view)
    return views


@dataclass(frozen=True)
class Zoom:
    """A size and a place that Custom Diffusion's augmentation gives a concept image, in pixels."""

    kind: Literal["plain", "far", "near"]
    side: int  # the square concept image is resized to this
    left: int  # where it lies on the canvas, if far; where the canvas lies on it, if near
    top: int
    mirrored: bool

    def view(self, middle: View, size: int, resample: Image.Resampling, flip: bool) -> View:
        """The middle square of a concept image as a (size, size) training image.

        Beside a far one the canvas is grey, which in [-1, 1] is 0 in the authors' code and 0.004 here: the cached
        images have eight bits. What was cut off is what lay beside the square, and beside the canvas if near.
        """
        middle = middle.mirrored if flip and self.mirrored else middle
        if self.kind == "plain":
            return middle.resized(size, resample)
        view = middle.resized(self.side, resample)
        if self.kind == "near":
            near = _crop(view.shown, size, (self.left, self.top), view.original)
            return replace(near, left=view.left + near.left, top=view.top + near.top, right=view.right + near.right)
        canvas = Image.new("RGB", (size, size), (128, 128, 128))
        canvas.paste(view.shown, (self.left, self.top))
        return replace(view, shown=canvas)


def zooms(size: int) -> list[Zoom]:
    """The `ZOOMS` equally likely zooms of a (size, size) image, those that leave it plain first.

    After Custom Diffusion's code, see docs/methods.md#custom-diffusion: with probability 2/3 an even side in
    [size / 3, size], else in [1.2 size, 1.4 size). A side below 0.6 size is placed anywhere on a grey canvas, one above
    size is cropped anywhere, and any other is no zoom. Its choices are independent; here sides are evenly spaced
    quantiles and places a low-discrepancy sequence, so that few images cover them evenly.
    """
    found, shrinking = [], ZOOMS * 2 // 3
    for k in range(ZOOMS):
        if k < shrinking:
            lowest, end, u = size // 3, size + 1, (k + 0.5) / shrinking
        else:
            lowest, end, u = int(1.2 * size), int(1.4 * size), (k - shrinking + 0.5) / (ZOOMS - shrinking)
        side = lowest + int(u * (end - lowest))
        side += side % 2
        kind = "far" if side < 0.6 * size else "near" if side > size else "plain"
        slack = 0 if kind == "plain" else abs(side - size)
        left, top = (int(_spread(k, step) * (slack + 1)) for step in (GOLDEN, SILVER))
        found.append(Zoom(kind, side, left, top, mirrored=k % 2 == 1))
    return sorted(found, key=lambda zoom: (zoom.kind != "plain", zoom.kind, zoom.mirrored))


def _spread(k: int, step: float) -> float:
    """In [0, 1): point k of a sequence that starts in the middle and never clusters (Kronecker's)."""
    return (0.5 + k * step) % 1


def _middle_square(image: Image.Image) -> View:
    side = min(image.size)
    return _crop(image, side, ((image.width - side) // 2, (image.height - side) // 2), image.size)


def _shorter_side_to(size: int, image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """As torchvision's Resize, which the scripts use: the longer side is rounded down."""
    width, height = (size * side // min(image.size) for side in image.size)
    return image.resize((width, height), resample)


def _place(image: Image.Image, size: int, place: float) -> tuple[int, int]:
    """Left and top of a (size, size) part; place in [0, 1] is where along the longer side."""
    return round((image.width - size) * place), round((image.height - size) * place)


def _corners(image: Image.Image, size: int) -> list[tuple[int, int]]:
    """`CROPS` places from end to end, each once."""
    return sorted({_place(image, size, k / (CROPS - 1)) for k in range(CROPS)})


def _crop(image: Image.Image, size: int, corner: tuple[int, int], original: tuple[int, int]) -> View:
    """original: width and height before `image` was resized."""
    x, y = corner
    return View(image.crop((x, y, x + size, y + size)), original, x, y, image.width - size - x)


def to_pixels(views: Sequence[Image.Image]) -> Tensor:
    """Square RGB images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(view, dtype=np.float32) for view in views])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, resized."""
    views = views_of(CENTRE_CROP, image, size)
    return views[len(views) // 2]


@dataclass(frozen=True)
class Rows:
    """Batch items to train on."""

    latents: Tensor  # (n, 4, h, w)
    images: Sequence[int]  # n: which image each row shows
    views: Sequence[int]  # n: and which of that image's views
    sizes: Tensor | None = None  # (n, 6): as `TextContext.sizes`, where the latents know them


class ConceptLatents:
    """Latents to train on, as the autoencoder's moments: sampled anew in every step.

    Args:
        concept: per concept image, the moments (V, 2, 4, h, w) of its V views: mean and deviation, scaled as the
            U-Net expects.
        class_images: the same for images of the class noun, where a method asks for them.
        captions: what each of the class images shows, where they are concept images with captions of their own.
        sizes: per concept image, what a base model is told of its V views, (V, 6), as `TextContext.sizes`; None for
            a base model that is told nothing, or to tell it of whole images.
        class_sizes: the same of the class images.

    Raises:
        ValueError: the sizes of one kind of images are known, and those of the other are not.
    """

    def __init__(
        self,
        concept: Sequence[Tensor],
        class_images: Sequence[Tensor] = (),
        captions: Sequence[str] = (),
        sizes: Sequence[Tensor] | None = None,
        class_sizes: Sequence[Tensor] | None = None,
    ) -> None:
        if class_images and (sizes is None) != (class_sizes is None):
            raise ValueError("sizes are needed of concept images and of class images, or of neither")
        self.concept, self.class_images, self.captions = list(concept), list(class_images), list(captions)
        self.sizes, self.class_sizes = sizes, class_sizes

    def __len__(self) -> int:
        return len(self.concept)

    def instances(self, size: int, generator: Generator) -> Tensor:
        """(size, 4, h, w): the latents of `instance_rows` alone."""
        return self.instance_rows(size, generator).latents

    def instance_rows(self, size: int, generator: Generator) -> Rows:
        """Concept images, none twice before all have been sampled once."""
        return _draw(self.concept, self.sizes, size, generator)

    def another_of_each(self, rows: Rows, generator: Generator) -> Rows:
        """For each row of the concept another concept image of it; the same one where there is only one."""
        shifts = torch.randint(max(1, len(self) - 1), (len(rows.images),), generator=generator).tolist()
        others = [(index + 1 + shift) % len(self) for index, shift in zip(rows.images, shifts, strict=True)]
        return _sampled(self.concept, self.sizes, others, generator)

    def prior_rows(self, size: int, generator: Generator) -> Rows:
        """Images of the class noun, none twice before all have been sampled once."""
        if not self.class_images:
            raise ValueError("these latents hold no class images; the method has to ask for them in `class_images`")
        return _draw(self.class_images, self.class_sizes, size, generator)


def _draw(images: Sequence[Tensor], sizes: Sequence[Tensor] | None, size: int, generator: Generator) -> Rows:
    rounds = -(-size // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])[:size].tolist()
    return _sampled(images, sizes, order, generator)


def _sampled(
    images: Sequence[Tensor], sizes: Sequence[Tensor] | None, order: Sequence[int], generator: Generator
) -> Rows:
    rows, chosen = [], []
    for index in order:
        views = images[index]
        chosen.append(int(torch.randint(len(views), (), generator=generator)))
        mean, deviation = views[chosen[-1]]
        rows.append(mean + deviation * torch.randn(mean.shape, generator=generator))
    told = None if sizes is None else torch.stack([sizes[i][view] for i, view in zip(order, chosen, strict=True)])
    return Rows(torch.stack(rows), order, chosen, told)
