"""Bring concept images in: check every one, then keep them as a concept. Originals are only read."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.concepts.concept import Concept, check_read_as_words
from personalize_core.errors import InputError, listed, shown
from personalize_core.files import outside
from personalize_core.files.atomic import new_folder
from personalize_core.files.outside import is_folder, is_there
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import sha256

if TYPE_CHECKING:
    from personalize_core.concepts.image_files import Listing

DESCRIPTION = "concept.yaml"
_KOHYA = re.compile(r"(\d+)_(\S+) (.+)")


def read_concept(folder: Path) -> Concept:
    """The concept that a folder of data/concepts describes.

    Raises:
        InputError: the description is missing or damaged.
    """
    path = folder / DESCRIPTION
    if not is_there(path):
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


def concept_images(folder: Path, names: Collection[str] | None = None) -> list[Path]:
    """The concept's images, sorted, every one decoded once.

    Args:
        names: only these of its files; the others are not opened.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    from personalize_core.concepts.image_files import listing

    found = listing(folder)
    if names is not None:
        found = replace(found, images=[path for path in found.images if path.name in names])
    return _checked_images(found, folder)


def check_folder(folder: Path) -> list[Path]:
    """The concept's images, sorted, after a look at all that the folder holds: the images, their masks, other files.

    Raises:
        InputError: there are no images, an image or mask cannot be used, or a file may be an image that is not read.
    """
    from personalize_core.concepts.image_files import check_all_known, listing

    found = listing(folder)
    if found.images:  # else it is said which files would be images
        check_all_known(found, folder)
    paths = _checked_images(found, folder)
    _masks(paths)
    return paths


def _checked_images(found: Listing, folder: Path) -> list[Path]:
    from personalize_core.concepts.image_check import check_images
    from personalize_core.concepts.image_files import IMAGE_SUFFIXES, check_all_known, image_files

    if found.images:
        check_images(found.images)
        return found.images
    check_all_known(found, folder)
    folders = [each for each in found.folders if not each.name.startswith(".") and each.name != "masks"]
    if within := [each for each in folders if image_files(each)]:
        raise InputError(
            f"{folder} holds no concept images, but its folders do: {listed(each.name for each in within)}; give the "
            f"folder that holds the images, such as {within[0]}"
        )
    raise InputError(
        f"{folder} holds no concept images; put some there as {listed(sorted(IMAGE_SUFFIXES))} (3 to 6 are usual)"
    )


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
    text = " ".join(outside.read_text(path).split()) if is_there(path) else ""
    try:
        check_read_as_words(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return text


@memoized
def content(folder: Path) -> dict[str, str]:
    """File name -> sha256, of the description and the concept images: all of a concept that results depend on."""
    from personalize_core.concepts.image_files import image_files

    return {path.name: sha256(path) for path in [folder / DESCRIPTION, *image_files(folder)]}


def add_concept(concepts: Path, photos: Path, class_noun: str | None = None, name: str | None = None) -> Concept:
    """Copy concept images to data/concepts, with their masks if they have some, and describe them.

    Args:
        photos: a folder of images; every image in it is checked, then copied byte for byte. So are the masks in its
            folder `masks`: NAME.png for the concept image NAME.*, white where it shows the concept.
        class_noun: by default what kohya's trainer reads in the folder's name; see `by_kohya`.
        name: by default the folder's own name, or what kohya's trainer reads in it.

    Raises:
        InputError: something cannot be used, or the concept exists already; nothing has been written then.
    """
    from personalize_core.concepts.image_files import MOST_BYTES

    if not is_folder(photos):
        raise InputError(f"{photos} is no folder; give the folder that holds the concept's images")
    named = by_kohya(photos)
    class_noun = class_noun or (named.class_noun if named else None)
    if class_noun is None:
        raise InputError("give the class noun, what kind of thing the concept is: --class-noun dog")
    concept = Concept.named(name or (named.name if named else photos.resolve().name), class_noun)
    folder = concepts / concept.name
    if is_there(folder):
        raise _taken(folder, photos, concept)
    paths = check_folder(photos)
    description = f'placeholder: "{concept.placeholder}"\nclass_noun: {concept.class_noun}\n'
    try:
        with new_folder(folder) as temporary:
            for path in [*paths, *_masks(paths)]:
                copy = temporary / path.relative_to(photos)
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(outside.read_bytes(path, MOST_BYTES))
            (temporary / DESCRIPTION).write_text(description)
    except FileExistsError:
        raise _taken(folder, photos, concept) from None
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        raise InputError(f"{concepts}, where concepts are kept, cannot be written: {error.strerror}") from None
    return concept


@dataclass(frozen=True)
class Named:
    """What a folder's name says to kohya's trainer: "10_rex dog"."""

    repeats: int
    name: str
    class_noun: str


def by_kohya(photos: Path) -> Named | None:
    """What kohya's trainer reads in a folder's name: how often to repeat its images, an identifier, a class."""
    found = _KOHYA.fullmatch(photos.resolve().name)
    return Named(int(found[1]), found[2].lower(), found[3]) if found else None


def left_out(photos: Path) -> list[str]:
    """Names of what a folder holds beside concept images and their masks, which `add_concept` does not copy, sorted.

    Hidden files are not among them.
    """
    from personalize_core.concepts.image_files import listing
    from personalize_core.concepts.masks import FOLDER

    found = listing(photos)
    stems = {path.stem for path in found.images}
    masks = [path for path in (photos / FOLDER).glob("*") if path.suffix != ".png" or path.stem not in stems]
    others = [path for path in [*found.side_files, *found.folders] if path.name != FOLDER]
    names = [path.relative_to(photos).as_posix() for path in [*others, *masks]]
    return sorted(name for name in names if not name.startswith("."))


def _taken(folder: Path, photos: Path, concept: Concept) -> InputError:
    """A folder of that name exists; it may hold somebody's only originals, so nothing advises to remove it."""
    described, same = is_there(folder / DESCRIPTION), folder.resolve() == photos.resolve()
    if same and described:
        return InputError(f"{photos} is the concept {concept.name!r} already; there is nothing to add")
    if same:
        return InputError(
            f"{photos} is where concepts are kept, and lacks only its description: write {photos / DESCRIPTION} with "
            f"two lines, 'placeholder: \"{concept.placeholder}\"' and 'class_noun: {concept.class_noun}'"
        )
    if described:
        return InputError(
            f"the concept {concept.name!r} exists already; choose another --name, or move {folder} elsewhere first"
        )
    return InputError(
        f"{folder} exists already, though it is no concept: it has no {DESCRIPTION}; choose another --name, or move it "
        "elsewhere first"
    )


def _masks(paths: list[Path]) -> list[Path]:
    """The masks that lie beside concept images, every one checked; none where there is no such folder."""
    from personalize_core.concepts.masks import mask_files

    return mask_files(paths) or []
