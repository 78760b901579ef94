"""Files that are either whole or not there, and the stamps that say what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from personalize_core.errors import InputError, shown
from personalize_core.files import outside
from personalize_core.files.stamps import Stamp, sha256, spelled_out

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
TICK = 20_000_000  # nanoseconds: a file system's times lag behind the clock by less
FORMAT = 2  # of results; to be raised when keys of stamps or descriptions, or columns of tables, get other names


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically: a reader sees the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        _discard(temporary)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises OSError where there is none, and InputError, a ValueError, where it is damaged."""
    path.stat()
    return outside.read_json(path, outside.MOST_RESULT)


def read_result(path: Path, again: str | None = None, /, **needed: type | tuple[type, ...]) -> dict[str, Any]:
    """An object that a step has written.

    Args:
        again: the command that makes it again, where `personalize explain` does not know it.
        needed: keys that it must have, and the types of their values.

    Raises:
        InputError: it is missing or damaged; the message says how to make it again.
    """
    try:
        found = outside.read_json_object(path, outside.MOST_RESULT)
    except InputError as error:
        raise _damaged(path, str(error), again) from None
    for key, kind in needed.items():
        if not isinstance(found.get(key), kind):
            raise _damaged(path, f"{path}: {key} = {shown(found.get(key))} is not what the program writes there", again)
    return found


def read_results(path: Path, *needed: str) -> list[dict[str, Any]]:
    """A list of objects that a step has written, each with these keys; see `read_result`."""
    try:
        found = outside.read_json(path, outside.MOST_RESULT)
    except InputError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.keys() >= {*needed} for one in found):
        raise _damaged(path, f"{path} is not the list that the program writes there")
    return found


def _damaged(path: Path, problem: str, again: str | None = None) -> InputError:
    if again:
        return InputError(f"{problem}; remove {path.parent}, and `{again}` makes it again")
    return InputError(f"{problem}; `personalize explain {path.parent}` says how to make it again")


def read_record(path: Path) -> dict[str, Any]:
    """What is known from before; nothing where no file says so, or only a damaged one: it is then found out again."""
    try:
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def record_of_result(path: Path, folder: Path) -> dict[str, Any]:
    """What was recorded of the very result that the folder holds; nothing where the record is of another."""
    found, stamp = read_record(path), read_record(folder / MANIFEST).get("stamp")
    return found if stamp is not None and found.get("stamp") == stamp else {}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Safetensors, atomically; the same tensors give the same bytes.

    Raises:
        OSError: they cannot be written, as where the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # which writes from the tensors' memory, without copies of it

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with folder_aside(path) as temporary:  # save_file may leave a file of a name of its own where it is killed
        new = temporary / path.name
        try:
            save_file(ordered, new, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            if not (system := re.search(r"\(os error (\d+)\)", str(error))):
                raise
            number = int(system[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        new.chmod(temporary.stat().st_mode & 0o666)  # as other files are: save_file lets nobody else read it
        os.replace(new, path)


@contextmanager
def whole_folder(folder: Path, stamp: str) -> Iterator[Path]:
    """Fill a folder that appears at once, with its stamp, when the block ends well; else nothing changes.

    What the stamp is of, where it knows, stands in the manifest too: the chain down to the bytes (lineage/).
    """
    with folder_aside(folder) as temporary:
        yield temporary
        made_from = {"made_from": spelled_out(stamp.of)} if isinstance(stamp, Stamp) else {}
        write_json(temporary / MANIFEST, {"format": FORMAT, "stamp": stamp, "files": _listing(temporary), **made_from})
        replaced = _beside(folder)
        replace_folder(folder, temporary, replaced)
        _discard(replaced)


def replace_folder(folder: Path, new: Path, before: Path) -> None:
    """Rename `new` to `folder`, and what was there, if anything, to `before`; if that fails, it is there again."""
    if folder.exists():
        os.rename(folder, before)
    try:
        os.rename(new, folder)
    except BaseException:
        if before.exists():
            os.rename(before, folder)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears at once when the block ends well, and is on the disk by then; else nothing changes.

    Raises:
        FileExistsError: something has this name, perhaps since a moment ago; it is left as it is.
    """
    with folder_aside(folder) as temporary:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if os.path.lexists(folder):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:  # since that look
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from None
            raise
        _sync(folder.parent)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`; it goes when the block ends, or, if the process is killed, a later time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
    finally:
        _discard(temporary)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_up_to_date(folder: Path, stamp: str) -> bool:
    """Does the folder hold, whole and unchanged, what was made from just that?"""
    try:
        manifest = read_json(folder / MANIFEST)
        return manifest["stamp"] == stamp and not changed_files(folder, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def changed_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The files of a result that are gone, or hold other bytes than its step wrote.

    A file that the system has not touched since its manifest was written needs no second look. One that it has touched
    is hashed; where all bytes are the same, the manifest's time becomes that of this look, so that it happens once.

    Args:
        files: as the manifest of the folder lists them, with `bytes` and `sha256` of each.
    """
    now, looked_at = time.time_ns(), (folder / MANIFEST).stat().st_mtime_ns
    if looked_at > now:  # a clock was set back, or the time was copied from elsewhere
        looked_at = 0
    changed, hashed = [], False
    for name, entry in files.items():
        try:
            about = (folder / name).stat()
        except OSError:
            changed.append(name)
            continue
        touched = max(about.st_mtime_ns, about.st_ctime_ns)  # a file that is renamed or linked keeps the first of them
        same = about.st_size == entry["bytes"]
        if same and touched > looked_at - TICK:
            same, hashed = sha256(folder / name) == entry["sha256"], True
        if not same:
            changed.append(name)
    if hashed and not changed:
        with suppress(OSError):  # of another user, or on a file system that is only read
            os.utime(folder / MANIFEST, ns=(now, now))
    return changed


def has_this_format(folder: Path) -> bool:
    """Is there a result in the folder whose files this version of the program can read?

    Without it, the keys and columns of its files may have names that this version does not know.
    """
    return read_record(folder / MANIFEST).get("format") == FORMAT


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _beside(path: Path) -> Path:
    """A name in the same folder, so that renaming it into place is one step of the file system.

    What a process that was killed left in that folder goes. Its name says which process on which machine works on it,
    for what another one is still writing must stay.
    """
    for entry in os.scandir(path.parent):
        maker = _TEMPORARY.fullmatch(entry.name)
        if maker and maker["machine"] == machine() and not _is_writing(int(maker["process"]), entry.name):
            _remove(Path(entry.path))
    name = f".{path.name}.{machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    _WRITING.add(name)
    return path.with_name(name)


_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})\.(?P<process>\d+)\.[0-9a-f]{8}\.tmp")
_WRITING: set[str] = set()  # by this process


def _is_writing(process: int, name: str) -> bool:
    """A number may be given to another process after a restart: at worst, what it left stays until that one ends."""
    return name in _WRITING if process == os.getpid() else psutil.pid_exists(process)


def _discard(temporary: Path) -> None:
    """One of our own, which may have been renamed into place by now."""
    _remove(temporary)
    _WRITING.discard(temporary.name)


def _remove(path: Path) -> None:
    """It may be a file or a folder, and another process may be removing it too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def machine() -> str:
    """Where a process number means the same process: containers may share a host's name, and count for themselves."""
    try:
        counting = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        counting = 0
    return hashlib.sha256(f"{platform.node()} {counting}".encode()).hexdigest()[:8]
