"""Foreground masks that come with a concept's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from personalize_core.concepts.image_check import check_images
from personalize_core.concepts.image_files import load_image
from personalize_core.errors import InputError, listed
from personalize_core.files.outside import is_there
from personalize_core.files.stamps import sha256

Mask = np.ndarray  # (h, w) bool of the image's own size; True: the concept
FOLDER = "masks"  # in a concept's folder: NAME.png for the image NAME.*, white where it shows the concept


def own_masks(concept_images: Sequence[Path]) -> list[Mask] | None:
    """The masks that came with a concept's images, in their order; None if none did.

    Raises:
        InputError: as `mask_files`.
    """
    paths = mask_files(concept_images)
    return None if paths is None else [np.asarray(load_image(path).convert("L")) > 127 for path in paths]


def mask_files(concept_images: Sequence[Path]) -> list[Path] | None:
    """The files of the masks that came with a concept's images, in their order; None if none did.

    Raises:
        InputError: some concept images have one and some have not, or one is damaged or of another size.
    """
    if not concept_images or not (folder := concept_images[0].parent / FOLDER).is_dir():
        return None
    paths = [folder / f"{path.stem}.png" for path in concept_images]
    if lacking := [path.name for path in paths if not is_there(path)]:
        raise InputError(
            f"{folder} lacks {listed(lacking)}; put a mask there for each concept image, or take them all out"
        )
    sizes = zip(paths, concept_images, check_images(paths), check_images(concept_images), strict=True)
    for path, concept_image, own, wanted in sizes:
        if own != wanted:
            one, other = (f"{width} x {height}" for width, height in (own, wanted))
            raise InputError(f"{path} has {one} pixels and {concept_image.name} {other}; make the mask as large")
    return paths


def own_content(folder: Path) -> dict[str, str]:
    """File name -> sha256, of the masks in a concept's folder: what its masked scores depend on."""
    return {path.name: sha256(path) for path in sorted((folder / FOLDER).glob("*.png"))}
