"""What in a concept's folder can be used and is most likely a mistake: said to whoever adds or checks it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from personalize_core.concepts.image_files import image_files, load_image
from personalize_core.concepts.masks import own_masks
from personalize_core.errors import listed

ONE_COLOUR = 2  # of 255: how far values of a colour may lie apart, as a JPEG of one colour has them


def doubts(folder: Path) -> list[str]:
    """A clause for each: empty masks, images of one colour, and images with the same pixels.

    Args:
        folder: one that `concept_files.check_folder` accepts.

    Raises:
        InputError: an image or a mask cannot be used.
    """
    paths, found = image_files(folder), []
    alike: dict[tuple[tuple[int, int], str], list[str]] = {}  # size and hash of the pixels -> names
    for path in paths:
        image = load_image(path)
        if np.ptp(np.asarray(image), axis=(0, 1)).max() <= ONE_COLOUR:
            found.append(f"{path.name} is of one colour")
        alike.setdefault((image.size, sha256(image.tobytes()).hexdigest()), []).append(path.name)
    found += [f"{listed(names)} are the same image" for names in alike.values() if len(names) > 1]
    for path, mask in zip(paths, own_masks(paths) or [], strict=False):
        if not mask.any():
            found.append(f"the mask of {path.name} is black all over, so it shows no concept")
    return found
