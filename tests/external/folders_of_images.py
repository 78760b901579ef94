"""Folders as other programs leave them, made of tiny images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from personalize_core.errors import InputError
from personalize_core.external.layouts import read_listing
from personalize_core.external.listing import Listing


def put_image(path: Path, text: Mapping[str, str] | None = None) -> Path:
    """An image of 8 x 8 pixels; `text` goes into a PNG's text chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    image = Image.new("RGB", (8, 8), "grey")
    if path.suffix == ".png":
        image.save(path, pnginfo=info)
    else:
        image.save(path)
    return path


def put_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows(listing: Listing) -> list[tuple[str, str, int | None]]:
    return [(image.file.as_posix(), image.prompt, image.seed) for image in listing.images]


def refusal(folder: Path, layout: str | None = None, **options: str) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(InputError) as refused:
        read_listing(folder, layout, options)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 900
    return message
