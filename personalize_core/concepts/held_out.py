"""Which of a concept's images are held back from training, so that scores can be taken against images nobody copied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from personalize_core.errors import InputError, listed

FEWEST = 6  # concept images; of fewer, none is held out
STAY = 3  # concept images that are trained on, at least


@dataclass(frozen=True)
class Split:
    """The file names of a concept's images, each list sorted; together they are all of them."""

    trained_on: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def split(files: Mapping[str, str], wanted: int | float) -> Split:
    """Choose the images that are held out, by their names alone.

    Those are held out whose names have the least SHA-256 (of the name in UTF-8, with its ending, as hexadecimal
    digits). So another image under the same name changes nothing in the choice. An image that is added is held out
    if its name comes among the first; then the last of those held out before is trained on, if a fixed number is
    wanted.

    Args:
        files: file name -> sha256 of its bytes, of the concept's images.
        wanted: how many, or, below 1, which share of them (rounded, and at least one); 0: none. Of fewer than `FEWEST`
            images none is held out, and `STAY` are always trained on.

    Raises:
        InputError: an image that would be held out has the same bytes as one that would be trained on.
    """
    count = how_many(len(files), wanted)
    by_digest = sorted(files, key=lambda name: (hashlib.sha256(name.encode()).hexdigest(), name))
    held_out, trained_on = sorted(by_digest[:count]), sorted(by_digest[count:])
    copies = {files[name]: name for name in trained_on}
    for name in held_out:
        if twin := copies.get(files[name]):
            raise InputError(
                f"{listed(sorted([name, twin]))} are the same image, and one of them would be held out while the other "
                "is trained on; take one of them out of the folder"
            )
    return Split(tuple(trained_on), tuple(held_out))


def how_many(images: int, wanted: int | float) -> int:
    """How many of a concept's images are held out."""
    if not wanted or images < FEWEST:
        return 0
    count = max(1, math.floor(wanted * images + 0.5)) if wanted < 1 else int(wanted)
    return min(count, images - STAY)
