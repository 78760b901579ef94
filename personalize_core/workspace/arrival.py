"""Concepts that arrive: every folder looked at and checked, and brought to data/concepts from wherever they arrive."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept import check_name
from personalize_core.errors import InputError, listed, printable
from personalize_core.files.atomic import folder_aside, read_record, replace_folder, write_json
from personalize_core.files.outside import user_path
from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.workspace.store import Store

RECORD = ".arrived.json"  # in a folder that was brought: from where, and what it held
INNER = "masks"  # the only folder within a concept's folder that is brought along
DEEPEST = 3  # levels of a location that are looked at: NAME/masks/FILE
REFUSED = "arrival.json"  # folders of the location that cannot be brought, and why


@dataclass(frozen=True)
class Folder:
    """One folder of data/concepts, as a look found it."""

    state: str  # equal on two looks: it has stopped changing. Of a concept, a hash of its content
    problem: str | None = None  # why it is no concept
    class_noun: str = ""  # of a concept
    concept_images: int = 0


def look(concepts: Path) -> dict[str, Folder]:
    """Every folder of data/concepts by its name: is it a concept whose every concept image can be read?

    Concept images are read again only where a file's size, time or inode has changed. Whatever goes wrong with one
    folder is its problem, and the others are looked at.
    """
    found = sorted(concepts.iterdir()) if concepts.is_dir() else []
    return {printable(path.name): _looked_at(path) for path in found if path.is_dir() and not path.name.startswith(".")}


def address_of(store: Store, location: str) -> str | None:
    """Where concepts arrive, as fsspec writes it; None: in data/concepts itself.

    Raises:
        InputError: it is in the folder of a user who is not known here.
    """
    if "://" in location or "::" in location:
        return location.rstrip("/")
    folder = Path(os.path.normpath(store.root / user_path(location)))
    return None if folder == store.concepts else str(folder)


def listing(address: str) -> dict[str, str]:
    """Each folder there by its name -> its state; only names, sizes and times are asked for.

    Raises:
        InputError: there is no such place, or it cannot be reached; the message says which.
    """
    files, root = _files(address)
    folders: dict[str, dict[str, str]] = {}
    for path, about in files.items():
        name, _, rest = path.removeprefix(root).lstrip("/").partition("/")
        if rest and not name.startswith("."):
            folders.setdefault(name, {})[rest] = str(sorted((key, str(value)) for key, value in about.items()))
    return {name: stamp_of(entries) for name, entries in sorted(folders.items())}


def receive(
    store: Store, address: str, there: Mapping[str, str], settled: Collection[str], gone: Iterable[str]
) -> None:
    """Bring what has settled to data/concepts, each folder whole or not at all; the originals are only read.

    What a person has changed here, or put here, is left as it is. What is gone there goes from here too, into
    data/.work/removed, if it was brought from there and is as it was brought. `refusals` says what was not done.

    Args:
        there: name -> state, as `listing` gave it.
        settled: names whose state was the same on the look before.
        gone: names that were brought from there and were missing on two looks.
    """
    before, refused = _refusals(store), {}
    for name in there:
        key = printable(name)
        folder, known = store.concepts / name, before.get(key, {})
        if name not in settled:
            if known:
                refused[key] = known
            continue
        if _is_here(folder, address, there[name]):
            continue
        if known.get("state") == there[name] and known.get("here") == _content_of(folder):
            refused[key] = known  # neither has changed, so it would be refused again
            continue
        try:
            check_name(name)
            _check_untouched(folder, address)
            _bring(store, address, name, there[name])
        except _Refused as error:
            refused[key] = {"state": there[name], "here": _content_of(folder), "why": str(error)}
        except Exception as error:  # whatever is wrong with one folder, the others are brought
            refused[key] = {"why": _reason(error, f"{address}/{name}")}
    refused |= _take_away(store, address, sorted(gone), nothing_left=not there)
    if refused != before:
        write_json(store.work(REFUSED), refused)


def brought(store: Store, address: str) -> list[str]:
    """The concepts here that were brought from there."""
    records = sorted(store.concepts.glob(f"*/{RECORD}"))
    return [path.parent.name for path in records if _record(path.parent).get("from") == address]


def refusals(store: Store) -> dict[str, str]:
    """What could not be brought, or taken away, at the last look: name -> why."""
    return {name: about["why"] for name, about in _refusals(store).items()}


class _Refused(InputError):
    """A folder cannot be brought as it is and as what lies here is: no use in trying again before either changes."""


# Looking


Entry = tuple[str, tuple[int, ...]]  # a file's path within the folder, and its kind, size, time and inode


def _looked_at(folder: Path) -> Folder:
    try:
        check_name(folder.name)
        found = sorted([*folder.iterdir(), *(folder / INNER).glob("*")])
        entries = tuple(_entry(folder, path) for path in found if path.name != RECORD)
    except InputError as error:
        return Folder("", str(error))
    except Exception as error:
        reason = _reason(error, folder)
        return Folder(stamp_of({"reason": reason}), reason)
    return _checked(folder, entries)


def _entry(folder: Path, path: Path) -> Entry:
    """Of a link, what it leads to. A file that has gone since it was listed has another state than before."""
    try:
        about = path.stat()
    except OSError:
        return path.relative_to(folder).as_posix(), ()
    if stat.S_ISDIR(about.st_mode):
        return path.relative_to(folder).as_posix(), (about.st_mode,)
    state = about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino
    return path.relative_to(folder).as_posix(), state


@lru_cache(maxsize=20_000)
def _checked(folder: Path, entries: tuple[Entry, ...]) -> Folder:
    try:
        concept, images = concept_files.read_concept(folder), concept_files.check_folder(folder)
        return Folder(_content(folder), None, concept.class_noun, len(images))
    except Exception as error:
        return Folder(stamp_of({"entries": entries}), _reason(error, folder))


def _reason(error: Exception, place: str | Path) -> str:
    """Why a folder cannot be used, whatever was raised while it was read."""
    if isinstance(error, InputError):
        return str(error)
    said = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return printable(f"{place} cannot be read: {said}")


def _content(folder: Path) -> str:
    """Of the description, the concept images and their masks."""
    masks = {path.name: sha256(path) for path in sorted((folder / INNER).glob("*.png"))}
    return stamp_of({"files": concept_files.content(folder), "masks": masks})


# Bringing


def _files(address: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Path -> what is known of each file, and the place that the paths lie in."""
    import fsspec

    try:
        system, root = fsspec.url_to_fs(address)
        system.invalidate_cache()  # an object store's last listing
        if not system.isdir(root):
            raise InputError(
                f"{address}, where params.yaml says that concepts arrive (automation.arrival), is no folder or cannot "
                "be reached; create it, or write another place"
            )
        return system.find(root, maxdepth=DEEPEST, detail=True), root
    except (OSError, ImportError, ValueError) as error:  # of the network, of a missing driver, of an unknown protocol
        if isinstance(error, InputError):
            raise
        raise InputError(f"{address}, where concepts arrive (automation.arrival), cannot be read: {error}") from error


def _bring(store: Store, address: str, name: str, state: str) -> None:
    """Copied beside, checked there, and renamed into place."""
    import fsspec

    folder = store.concepts / name
    files, root = _files(address)
    system = fsspec.url_to_fs(address)[0]
    try:
        with folder_aside(store.concepts / "arriving") as aside:
            new = aside / name
            new.mkdir()
            for path, about in files.items():
                parts = PurePosixPath(path.removeprefix(root).lstrip("/")).parts
                wanted = parts[1:2] == parts[1:] or (parts[1:2] == (INNER,) and len(parts) == 3)
                if parts[0] == name and wanted and not any(part.startswith(".") for part in parts):
                    _check_copyable(path, about, root)
                    local = new.joinpath(*parts[1:])
                    local.parent.mkdir(exist_ok=True)
                    system.get_file(path, str(local))
            if listing(address).get(name) != state:
                return  # it changed meanwhile, and is brought when it has settled
            try:
                concept_files.read_concept(new)
                concept_files.check_folder(new)
            except InputError as error:
                raise _Refused(str(error).replace(str(new), f"{address}/{name}")) from None
            content = _content(new)
            if folder.exists() and not _record(folder) and _content_of(folder) != content:
                raise _occupied(folder, address)
            write_json(new / RECORD, {"from": address, "state": state, "content": content})
            replace_folder(folder, new, aside / "before")
    except OSError as error:
        raise InputError(f"{address}/{name} cannot be copied to {folder}: {error}") from error


def _check_copyable(path: str, about: Mapping[str, Any], root: str) -> None:
    """Raise unless it is a file of bounded size, and no link that leads out of the place where concepts arrive."""
    from personalize_core.concepts.image_files import MOST_BYTES as most

    size = about.get("size") or 0
    if about.get("islink"):
        target = Path(path).resolve()
        if not target.is_relative_to(Path(root).resolve()):
            raise _Refused(f"{path} is a link that leads out of {root}; put the file itself there")
        regular = target.is_file()
    else:
        regular = about.get("type", "file") == "file"
    if not regular:
        raise _Refused(f"{path} is no regular file; put the file itself there, or take it out")
    if size > most:
        raise _Refused(f"{path} has {size:,} bytes, and at most {most:,} are read of an image; take it out")


def _is_here(folder: Path, address: str, state: str) -> bool:
    record = _record(folder)
    return record.get("from") == address and record.get("state") == state


def _check_untouched(folder: Path, address: str) -> None:
    """Raise unless what lies here may be replaced: nothing, or what was brought from there, byte for byte."""
    if not folder.exists() or not (record := _record(folder)):
        return  # what a person put here is compared with what arrives, once that has been copied
    if record.get("from") != address:
        raise _occupied(folder, address)
    if not _unchanged(folder, record):
        raise InputError(
            f"{folder.name!r} is another one in {address} by now, and {folder} was changed here since it was brought, "
            "so it is not replaced; move it elsewhere to take the one that arrived, or take that one away"
        )


def _occupied(folder: Path, address: str) -> _Refused:
    return _Refused(
        f"{address}/{folder.name} arrived, but {folder} exists already and was not brought from there, so it is not "
        "replaced; move one of the two elsewhere, or give what arrives another name"
    )


def _take_away(store: Store, address: str, gone: list[str], nothing_left: bool) -> dict[str, dict[str, Any]]:
    if gone and nothing_left:  # rather a disk that is not mounted than the end of all concepts
        why = f"{address} is empty; {listed(gone)}, which came from there, stay here until they are moved away here too"
        return {name: {"why": why} for name in gone}
    refused = {}
    for name in gone:
        folder = store.concepts / name
        if _unchanged(folder, _record(folder)):
            kept = store.work("removed", f"{name}.{uuid.uuid4().hex[:8]}")
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                os.rename(folder, kept)
            except OSError as error:
                refused[name] = {"why": f"{name!r} is gone from {address}, but {folder} cannot be moved: {error}"}
        else:
            why = f"{name!r} is gone from {address}, but {folder} was changed here since, so it stays until it is moved"
            refused[name] = {"why": why}
    return refused


def _unchanged(folder: Path, record: Mapping[str, Any]) -> bool:
    return "content" in record and record["content"] == _content_of(folder)


def _content_of(folder: Path) -> str:
    """The same of any folder; "" where it is no concept's, or is not there."""
    try:
        return _content(folder)
    except (OSError, InputError):  # no description, for instance
        return ""


def _record(folder: Path) -> dict[str, Any]:
    return read_record(folder / RECORD)


def _refusals(store: Store) -> dict[str, dict[str, Any]]:
    """What is damaged there is as good as not written: the next look finds out again what cannot be brought."""
    found = read_record(store.work(REFUSED))
    return {name: about for name, about in found.items() if isinstance(about, dict) and "why" in about}
