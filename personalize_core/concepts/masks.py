"""Foreground masks that come with a concept's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from personalize_core.concepts.images import load_picture
from personalize_core.errors import InputError, listed
from personalize_core.files.stamps import sha256

Mask = np.ndarray  # (h, w) bool of the image's own size; True: the concept
FOLDER = "masks"  # in a concept's folder: NAME.png for the image NAME.*, white where it shows the concept


def own_masks(photographs: Sequence[Path]) -> list[Mask] | None:
    """The masks that came with a concept's photographs, in their order; None if none did.

    Raises:
        InputError: some photographs have one and some have not, or one is damaged or of another size.
    """
    if not photographs or not (folder := photographs[0].parent / FOLDER).is_dir():
        return None
    paths = [folder / f"{path.stem}.png" for path in photographs]
    if lacking := [path.name for path in paths if not path.is_file()]:
        raise InputError(
            f"{folder} lacks {listed(lacking)}; put a mask there for each photograph, or take them all out"
        )
    found = []
    for path, photograph in zip(paths, photographs, strict=True):
        mask, picture = load_picture(path).convert("L"), load_picture(photograph)
        if mask.size != picture.size:
            one, other = (f"{image.width} x {image.height}" for image in (mask, picture))
            raise InputError(f"{path} has {one} pixels and {photograph.name} {other}; make the mask as large")
        found.append(np.asarray(mask) > 127)
    return found


def own_content(folder: Path) -> dict[str, str]:
    """File name -> sha256, of the masks in a concept's folder: what its masked scores depend on."""
    return {path.name: sha256(path) for path in sorted((folder / FOLDER).glob("*.png"))}
