"""What a folder of images made elsewhere holds: files, prompts and seeds, checked before any image is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from personalize_core.concepts.image_files import IMAGE_SUFFIXES
from personalize_core.errors import InputError, listed, shown

MOST_IMAGES = 200_000  # of one listing
MOST_PROMPT = 20_000  # characters
MOST_SEED = 2**64 - 1  # the largest seed of torch's generators, and of ComfyUI's samplers


@dataclass(frozen=True)
class ExternalImage:
    """An image that another program made.

    `file` is relative to the folder of the listing. `prompt` has single spaces in place of line breaks and runs of
    spaces. `seed` is from 0 to 2**64 - 1, and None where the layout does not say it.
    """

    file: Path
    prompt: str
    seed: int | None


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in the layout's order.

    `left_out` holds (file, reason) of what the layout names and cannot be scored; `base_model`, what made the images,
    where the layout says it.
    """

    images: tuple[ExternalImage, ...]
    layout: str
    left_out: tuple[tuple[str, str], ...] = ()
    base_model: str | None = None


def external_image(name: str, prompt: str, seed: int | None, where: str) -> ExternalImage:
    """One image, of what a file from outside says about it.

    Args:
        name: its path relative to the folder, with `/` or, as Windows writes it, `\\`.
        where: what the values were read from, for messages: "prompts.csv, line 3".

    Raises:
        InputError: the path leads out of the folder or is not an image's, the prompt is empty or too long, or the seed
            is out of range.
    """
    return ExternalImage(inner_path(name, where), checked_prompt(prompt, where), checked_seed(seed, where))


def inner_path(name: str, where: str) -> Path:
    """A path relative to the folder; raises InputError where it may lead out of it, or is not named like an image."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name.strip() or not parts.name or any(character in name for character in "\0\n") or _is_cut(name):
        raise InputError(f"{where}: {shown(name)} is not the name of a file")
    if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
        raise InputError(f"{where}: {shown(name)} leads out of the folder; write a path relative to it, without '..'")
    if parts.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(
            f"{where}: {shown(name)} is not named like an image; its name should end in one of "
            f"{listed(sorted(IMAGE_SUFFIXES))}"
        )
    return Path(*parts.parts)


def _is_cut(name: str) -> bool:
    """Does it hold bytes that are not UTF-8, which no table can hold?"""
    return any("\ud800" <= character <= "\udfff" for character in name)


def checked_prompt(prompt: str, where: str) -> str:
    """The prompt with single spaces; raises InputError where it is empty or too long."""
    text = " ".join(prompt.split())
    if not text:
        raise InputError(f"{where}: the prompt is empty")
    if len(text) > MOST_PROMPT:
        raise InputError(f"{where}: the prompt has {len(text):,} characters, and at most {MOST_PROMPT:,} are read")
    return text


def checked_seed(seed: int | None, where: str) -> int | None:
    """The seed; raises InputError where no generator takes it."""
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise InputError(f"{where}: the seed is {shown(seed)}, and should be from 0 to 2**64 - 1")
    return seed


def check(listing: Listing, folder: Path) -> None:
    """Check a listing as a whole; only the directory is looked at, no image is opened.

    An image that is there and cannot be read is found when it is scored.

    Raises:
        InputError: there is no image, or there are too many; one is missing, is not a regular file, or is listed twice;
            or two have the same prompt and seed.
    """
    if not listing.images:
        why = f": {_reasons(listing.left_out)}" if listing.left_out else ""
        raise InputError(f"{folder} holds no image that can be scored by the layout {listing.layout!r}{why}")
    if len(listing.images) > MOST_IMAGES:
        raise InputError(
            f"{folder} lists {len(listing.images):,} images, and at most {MOST_IMAGES:,} are scored at once"
        )
    names = [image.file.as_posix() for image in listing.images]
    if twice := _repeated(names):
        raise InputError(f"{folder} lists {listed(map(shown, twice), 4)} more than once; list each image once")
    if missing := [name for name in names if not _is_file(folder / name)]:
        raise InputError(
            f"{folder} lacks {len(missing):,} of the {len(names):,} images that its layout {listing.layout!r} names: "
            f"{listed(map(shown, missing), 4)}; put them there, or take them out of the list"
        )
    first: dict[tuple[str, int], str] = {}
    for image, name in zip(listing.images, names, strict=True):
        if image.seed is None:
            continue
        other = first.setdefault((image.prompt, image.seed), name)
        if other != name:
            raise InputError(
                f"{folder} holds two images of the prompt {shown(image.prompt)} with the seed {image.seed}, "
                f"{shown(other)} and {shown(name)}; list only one of them"
            )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # missing, a link that leads nowhere or to itself, a name that is too long
        return False


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))


def _reasons(left_out: Iterable[tuple[str, str]]) -> str:
    return listed([f"{shown(name)} {reason}" for name, reason in left_out], 4)
