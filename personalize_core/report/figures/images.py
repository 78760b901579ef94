"""Images for figures: read upright, cut to a square, and made small for a user interface."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from personalize_core.concepts.image_files import load_image

ImageSource = Image.Image | str | Path


def opened(image: ImageSource) -> Image.Image:
    """A concept image or a sampled one, as RGB."""
    return image.convert("RGB") if isinstance(image, Image.Image) else load_image(Path(image))


def opened_figure(path: str | Path) -> Image.Image:
    """A PNG that the program itself has written, of any size, as RGB."""
    with Image.open(path, formats=("PNG",)) as file:
        return file.convert("RGB")


def square(image: ImageSource, side: int) -> Image.Image:
    """The middle of an image, side x side pixels; small ones are enlarged smoothly."""
    return ImageOps.fit(opened(image), (side, side), Image.Resampling.LANCZOS)


def thumbnail_webp(image_path: str | Path, limit_bytes: int = 700) -> bytes:
    """The largest, then finest WebP of an image that fits into `limit_bytes`; its shape is kept.

    Raises:
        ValueError: not even a few grey pixels fit.
    """
    image = opened_figure(image_path)
    for side in (160, 128, 112, 96, 80, 64, 48, 40, 32, 24, 16, 8):
        small = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        for quality in (60, 40, 25, 12):
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=6)
            if buffer.tell() <= limit_bytes:
                return buffer.getvalue()
    raise ValueError(f"no WebP of {image_path} fits into {limit_bytes} bytes")
