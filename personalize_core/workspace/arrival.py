"""Concepts that arrive: every folder looked at and checked, and brought to data/concepts from wherever they arrive."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept import check_name
from personalize_core.errors import InputError, printable
from personalize_core.errors import listed as in_words
from personalize_core.files.atomic import folder_aside, read_record, replace_folder, write_json
from personalize_core.files.outside import user_path
from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.workspace.store import Store

RECORD = ".arrived.json"  # in a folder that was brought: from where, and what it held
INNER = "masks"  # the only folder within a concept's folder that is brought along
DEEPEST = 3  # levels of a location that are looked at: NAME/masks/FILE
REFUSED = "arrival.json"  # folders of the location that cannot be brought, and why
LOOKED = "looked.json"  # what the folders of data/concepts were found to be


@dataclass(frozen=True)
class Folder:
    """One folder of data/concepts, as a look found it."""

    state: str  # a hash of its content; "" where it is no concept
    problem: str | None = None  # why it is no concept
    class_noun: str = ""  # of a concept
    concept_images: int = 0


def listed(concepts: Path) -> dict[str, str]:
    """Every folder of data/concepts by its name -> what changes with its files, of which no byte is read."""
    return {printable(folder.name): _listed(folder) for folder in _folders(concepts)}


def known(store: Store, here: Mapping[str, str]) -> dict[str, Folder]:
    """What `look` found, of the folders that are as they were then.

    Args:
        here: as `listed` gave it.
    """
    record = read_record(store.work(LOOKED))
    if record.get("by") != _by():
        return {}
    try:
        folders = {name: dict(about) for name, about in record["folders"].items()}
        return {name: Folder(**about) for name, about in folders.items() if about.pop("listed") == here.get(name)}
    except (AttributeError, KeyError, TypeError, ValueError):  # damaged: all are read again
        return {}


def look(store: Store, most: int | None = None, again: bool = False) -> dict[str, Folder]:
    """Every folder of data/concepts by its name: is it a concept whose every concept image can be read?

    A folder is read where a file's size, time or inode has changed since the last look of any process. Whatever goes
    wrong with one folder is its problem, and the others are looked at.

    Args:
        most: how many may be read; those that are left are not among the folders.
        again: read those that could not be used again, whether or not they have changed.
    """
    folders = {printable(folder.name): folder for folder in _folders(store.concepts)}
    here = {name: _listed(folder) for name, folder in folders.items()}
    found = {name: folder for name, folder in known(store, here).items() if not (again and folder.problem)}
    unread = [name for name in folders if name not in found][:most]
    found |= {name: _looked_at(folders[name]) for name in unread}
    if unread:
        about = {name: {"listed": here[name]} | dataclasses.asdict(folder) for name, folder in found.items()}
        write_json(store.work(LOOKED), {"by": _by(), "folders": about})
    return {name: found[name] for name in folders if name in found}


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


def bring(store: Store, address: str, wanted: Mapping[str, str], gone: Collection[str]) -> list[str]:
    """Bring what has settled to data/concepts, each folder whole or not at all; the originals are only read.

    What a person has changed here, or put here, is left as it is. What is gone there goes from here too, into
    data/.work/removed, if it was brought from there and is as it was brought. `refusals` says what was not done.

    Args:
        wanted: name -> state, as `listing` gave it on two looks; what is another one by now is left to the next.
        gone: names that were brought from there and were missing on two looks.

    Returns:
        The names that could not be brought for a reason that may pass.

    Raises:
        InputError: the place cannot be reached.
    """
    there = listing(address)
    before, refused, passing = _refusals(store), {}, []
    for name in there:
        key = printable(name)
        folder, earlier = store.concepts / name, before.get(key, {})
        if wanted.get(name) != there[name]:
            if earlier:
                refused[key] = earlier
            continue
        if _is_here(folder, address, there[name]):
            continue
        if earlier.get("state") == there[name] and earlier.get("here") == _content_of(folder):
            refused[key] = earlier | {"tried": _tried(there[name], folder)}
            continue  # neither has changed, so it would be refused again
        try:
            check_name(name)
            _check_untouched(folder, address)
            _bring(store, address, name, there[name])
        except _Refused as error:
            refused[key] = {"state": there[name], "here": _content_of(folder), "why": str(error)}
        except Exception as error:  # whatever is wrong with one folder, the others are brought
            refused[key] = {"why": _reason(error, f"{address}/{name}")}
            if isinstance(error.__cause__ or error, OSError):
                passing.append(name)
        if key in refused and name not in passing:
            refused[key]["tried"] = _tried(there[name], folder)
    refused |= _take_away(store, address, sorted({*gone} - there.keys()), nothing_left=not there)
    if refused != before:
        write_json(store.work(REFUSED), refused)
    return passing


def to_bring(
    store: Store, address: str, settled: Mapping[str, str], seen: Collection[str], here: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """What has settled there, and what is gone, as far as `bring` has not tried it as it is now.

    Args:
        settled: name -> state, as `listing` gave it on two looks.
        seen: the names of either look.
        here: as `listed` gave it.
    """
    before, brought_before = _refusals(store), brought(store, address)

    def untried(name: str, state: str) -> bool:
        key = printable(name)
        return before.get(key, {}).get("tried") != [state, here.get(key, "")]

    new = {name: state for name, state in settled.items() if brought_before.get(name) != state and untried(name, state)}
    return new, [name for name in brought_before if name not in seen and untried(name, "")]


def _tried(state: str, folder: Path) -> list[str]:
    return [state, _listed(folder) if folder.is_dir() else ""]


def brought(store: Store, address: str) -> dict[str, str]:
    """The concepts here that were brought from there, each with the state that it had there."""
    records = {path.parent.name: _record(path.parent) for path in sorted(store.concepts.glob(f"*/{RECORD}"))}
    return {name: str(record.get("state")) for name, record in records.items() if record.get("from") == address}


def refusals(store: Store) -> dict[str, str]:
    """What could not be brought, or taken away, at the last look: name -> why."""
    return {name: about["why"] for name, about in _refusals(store).items()}


class _Refused(InputError):
    """A folder cannot be brought as it is and as what lies here is: no use in trying again before either changes."""


# Looking


def _folders(concepts: Path) -> list[Path]:
    if not concepts.is_dir():
        return []
    with os.scandir(concepts) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [concepts / name for name in names]


def _listed(folder: Path) -> str:
    """A hash of the kind, size, time and inode of everything in the folder and among its masks; of links' targets."""
    try:
        found = [*_entries(folder, ""), *_entries(folder / INNER, INNER)]
    except OSError as error:
        return printable(f"{type(error).__name__} {error.errno}")
    return hashlib.sha256(repr(sorted(found)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _entries(folder: Path, within: str) -> list[tuple[str, str, tuple[int, ...]]]:
    try:
        with os.scandir(folder) as entries:
            return [(within, entry.name, _state(entry)) for entry in entries if entry.name != RECORD]
    except (FileNotFoundError, NotADirectoryError):
        if within:
            return []
        raise


def _state(entry: os.DirEntry[str]) -> tuple[int, ...]:
    """A file that has gone since it was listed has another state than before."""
    try:
        about = entry.stat()
    except OSError:
        return ()
    if stat.S_ISDIR(about.st_mode):
        return (about.st_mode,)
    return about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino


def _looked_at(folder: Path) -> Folder:
    try:
        check_name(folder.name)
        concept, images = concept_files.read_concept(folder), concept_files.check_folder(folder)
        return Folder(_content(folder), None, concept.class_noun, len(images))
    except Exception as error:
        return Folder("", _reason(error, folder))


@cache
def _by() -> str:
    """What decides whether a folder can be used: another version of it looks at every folder again."""
    return stamp_of({path.name: sha256(path) for path in sorted(Path(concept_files.__file__).parent.glob("*.py"))})


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
        why = (
            f"{address} is empty; {in_words(gone)}, which came from there, stay here until they are moved away here too"
        )
        return {name: {"why": why, "tried": _tried("", store.concepts / name)} for name in gone}
    refused: dict[str, dict[str, Any]] = {}
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
        if name in refused:
            refused[name]["tried"] = _tried("", folder)
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
