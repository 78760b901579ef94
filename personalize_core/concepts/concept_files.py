"""Bring concept images in: check every one, then keep them as a concept. Originals are only read."""

from __future__ import annotations

import os
import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError, listed, shown
from personalize_core.files import outside
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import sha256

DESCRIPTION = "concept.yaml"
MOST_PIXELS = 100_000_000  # a larger file is no concept image to learn from, and decoding it would fill the memory


def read_concept(folder: Path) -> Concept:
    """The concept that a folder of data/concepts describes.

    Raises:
        InputError: the description is missing or damaged.
    """
    path = folder / DESCRIPTION
    if not outside.is_there(path):
        raise InputError(
            f"{folder} holds no {DESCRIPTION}; write one there with two lines, 'placeholder: \"<{folder.name}>\"' and "
            "'class_noun: NOUN', or add concept images with `personalize add`"
        )
    values = _read(outside.read_text(path), path)
    if not isinstance(values, dict) or set(values) != {"placeholder", "class_noun"}:
        raise InputError(f"{path} must hold two lines, 'placeholder: <{folder.name}>' and 'class_noun: NOUN'")
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{path}: {key} = {shown(value)}: it should be a word")
    return Concept(folder.name, values["placeholder"], values["class_noun"])


@lru_cache(maxsize=20_000)  # a plan reads it several times for each of its methods
def _read(text: str, path: Path) -> Any:
    return outside.parse_yaml(text, path, plain=True)  # where "no" and "on" are words


def concept_images(folder: Path) -> list[Path]:
    """The concept's images, sorted, every one decoded once.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    from personalize_core.concepts.image_files import IMAGE_SUFFIXES, image_files, load_image

    paths = image_files(folder)
    if not paths:
        raise InputError(
            f"{folder} holds no concept images; put some there as {listed(sorted(IMAGE_SUFFIXES))} (3 to 6 are usual)"
        )
    for path in paths:
        image = load_image(path)
        if image.width * image.height > MOST_PIXELS:
            raise InputError(f"{path} has {image.width} x {image.height} pixels; make it smaller than 100 megapixels")
    return paths


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """The concept images of a folder, sorted, each with the caption in the text file of its name; "" without one.

    Raises:
        InputError: there is no such folder, it holds no concept images, or a concept image or caption cannot be read.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist; put concept images of things of that kind there, and beside each 'NAME.jpg' its "
            "caption in 'NAME.txt' if it has one"
        )
    return [(path, _caption(path.with_suffix(".txt"))) for path in concept_images(folder)]


def _caption(path: Path) -> str:
    return " ".join(outside.read_text(path).split()) if outside.is_there(path) else ""


@memoized
def content(folder: Path) -> dict[str, str]:
    """File name -> sha256, of the description and the concept images: all of a concept that results depend on."""
    from personalize_core.concepts.image_files import image_files

    return {path.name: sha256(path) for path in [folder / DESCRIPTION, *image_files(folder)]}


def add_concept(concepts: Path, photos: Path, class_noun: str, name: str | None = None) -> Concept:
    """Copy concept images to data/concepts, with their masks if they have some, and describe them.

    Args:
        photos: a folder of images; every image in it is checked, then copied byte for byte. So are the masks in its
            folder `masks`: NAME.png for the concept image NAME.*, white where it shows the concept.
        name: by default the folder's own name.

    Raises:
        InputError: something cannot be used, or the concept exists already; nothing has been written then.
    """
    if not photos.is_dir():
        raise InputError(f"{photos} is no folder; give the folder that holds the concept's images")
    concept = Concept.named(name or photos.resolve().name, class_noun)
    paths = concept_images(photos)
    unreadable = [path.name for path in photos.iterdir() if path.is_file() and path not in paths and _is_suspect(path)]
    if unreadable:
        raise InputError(
            f"{photos} also holds {listed(sorted(unreadable))}, no image by name; take it out or rename it"
        )
    masks = _masks(paths)
    folder = concepts / concept.name
    if folder.exists():
        raise InputError(
            f"the concept {concept.name!r} exists already; choose another --name, or remove {folder} first"
        )

    temporary = concepts / f".{concept.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        for path in paths:
            shutil.copyfile(path, temporary / path.name)
        for path in masks:
            (temporary / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / path.parent.name / path.name)
        lines = f'placeholder: "{concept.placeholder}"\nclass_noun: {concept.class_noun}\n'
        (temporary / DESCRIPTION).write_text(lines)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return concept


def _masks(paths: list[Path]) -> list[Path]:
    """The masks that lie beside concept images, every one checked; none where there is no such folder."""
    from personalize_core.concepts.masks import FOLDER, own_masks

    if own_masks(paths) is None:
        return []
    return [path.parent / FOLDER / f"{path.stem}.png" for path in paths]


def _is_suspect(path: Path) -> bool:
    """A file that its owner may have meant as a concept image: neither hidden nor a text beside the images."""
    return not path.name.startswith(".") and path.suffix.lower() not in {".txt", ".md", ".csv", ".json", ".yaml"}
