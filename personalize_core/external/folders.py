"""What the layouts share: which images a folder holds, a list of prompts, an option that chooses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from personalize_core.concepts.image_files import IMAGE_SUFFIXES
from personalize_core.errors import InputError, listed, shown
from personalize_core.external.listing import MOST_IMAGES, checked_prompt
from personalize_core.files.outside import is_folder, is_there, open_regular, read_json, read_text, user_path

MOST_LIST = 64 * 2**20  # bytes of a list of images or prompts


def image_names(folder: Path) -> list[str]:
    """The names of a folder's images by their endings, sorted; hidden files and subfolders are not looked at.

    Raises:
        InputError: the folder cannot be read, holds too many images, or one has a name that is not UTF-8.
    """
    found = [
        entry.name
        for entry in _entries(folder)
        if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not _is_folder(entry)
    ]
    if len(found) > MOST_IMAGES:
        raise InputError(f"{folder} holds {len(found):,} images, and at most {MOST_IMAGES:,} are scored at once")
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{folder} holds {shown(name)}, whose name is not UTF-8; rename it") from None
    return found


def images_named(folder: Path, form: re.Pattern[str]) -> dict[str, re.Match[str]]:
    """Those of a folder's images whose names without their endings have a form: name -> its parts, sorted."""
    return {name: match for name in image_names(folder) if (match := form.fullmatch(Path(name).stem))}


def all_named(folder: Path, form: re.Pattern[str]) -> bool:
    """Does the folder hold images, and have the names of all of them this form?"""
    names = image_names(folder)
    return bool(names) and len(images_named(folder, form)) == len(names)


def inner_folder(folder: Path, *names: str) -> Path:
    """The folder in which a tool puts its images; the folder itself where that is the one that was given."""
    inner = folder.joinpath(*names)
    return inner if is_folder(inner) else folder


def folder_names(folder: Path) -> list[str]:
    """The names of a folder's subfolders, sorted, without hidden ones; a link to a folder counts as one.

    Raises:
        InputError: the folder cannot be read.
    """
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A folder or a link to one, without asking the disk about each file."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def prompts_of(path: Path) -> list[str]:
    """The prompts of a text file, one a line. Empty lines and lines that begin with '#' are skipped.

    Raises:
        InputError: it cannot be read, is not text in UTF-8, or holds no prompt.
    """
    lines = [line.strip() for line in read_text(path, MOST_LIST).splitlines()]
    prompts = [checked_prompt(line, str(path)) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompt; write one a line")
    return prompts


def named_or_found(folder: Path, options: Mapping[str, str], option: str, names: Sequence[str]) -> Path | None:
    """The file that an option names, or the first of these names that lies in the folder, or None.

    A relative path of an option is looked for in the folder first, then where the program was started.
    """
    if option in options:
        named = user_path(options[option])
        return folder / named if not named.is_absolute() and is_there(folder / named) else named
    return next((folder / name for name in names if is_there(folder / name)), None)


def chosen(options: Mapping[str, str], option: str, there: Sequence[str], folder: Path) -> str | None:
    """What an option chooses among what is there, or None without the option.

    Raises:
        InputError: it names something that is not there; the message lists what is.
    """
    if option in options and options[option] not in there:
        raise InputError(f"{folder} has no {option} {shown(options[option])}; there are {listed(there, 12)}")
    return options.get(option)


def check_folder(folder: Path) -> None:
    """Raise InputError where there is no such folder."""
    if not is_folder(folder):
        what = "is not a folder" if is_there(folder) else "does not exist"
        raise InputError(f"{folder} {what}; name the folder that holds the images")


def only_or_chosen(options: Mapping[str, str], option: str, there: Sequence[str], folder: Path) -> str:
    """The only thing that is there, or the one that an option chooses.

    Raises:
        InputError: there are several, and no option; or the option names something else; the message lists what is
            there.
    """
    found = chosen(options, option, there, folder)
    if found is None and len(there) > 1:
        raise InputError(f"{folder} holds several; choose one by the option {option}: {listed(there, 12)}")
    return there[0] if found is None else found


def png_header(path: Path) -> tuple[tuple[int, int], dict[str, str]] | None:
    """Width and height of a PNG, and its text chunks before the pixels; None if it is not one or is damaged.

    No pixel is decoded. Pillow bounds the size of the chunks.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
            return image.size, {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except Exception:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
        return None


def object_in(value: Any, *keys: str) -> dict[str, Any]:
    """The object that lies under these keys, or an empty one where something on the way is missing or is no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def texts_in(path: Path) -> dict[str, str]:
    """A JSON object of texts.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    found = read_json(path, MOST_LIST)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path} should hold a JSON object of texts")
    return found
