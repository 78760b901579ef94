"""The image files of a folder: which there are, and one read as upright RGB."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from personalize_core.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def load_image(path: Path) -> Image.Image:
    """The concept image as RGB, upright by its EXIF orientation.

    Raises:
        InputError: the file is missing, empty, damaged or no image.
    """
    try:
        with Image.open(path) as opened:
            return _as_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "is empty" if path.is_file() and path.stat().st_size == 0 else "cannot be read as an image"
        raise InputError(f"{path} {what} ({type(error).__name__}); replace it or take it out of the folder") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """Where an image is transparent it becomes white, as viewers show it; sixteen bits become eight."""
    if image.mode.startswith("I;16"):
        import numpy as np

        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))  # Pillow would cut all at 255
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """The images of a folder by their names' endings, sorted; hidden files and subfolders are not looked at."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
