"""A stamp names everything that a result depends on, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError
from personalize_core.files.outside import open_regular


def sha256(path: Path) -> str:
    """Of a regular file's bytes.

    Raises:
        InputError: it is a folder, a FIFO or a device.
        OSError: it cannot be opened.
    """
    with open_regular(path) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_or_none(path: Path) -> str | None:
    """The same; None of what cannot be read: if it can be a moment later, its hash is another."""
    try:
        return sha256(path)
    except (OSError, InputError):
        return None


def folder_hash(folder: Path, names: Sequence[str] = ("*",)) -> str:
    """Of the bytes of its files, by name, that match one of the patterns.

    Gigabytes are read once a process, and again when a file's size or time has changed.
    """
    files = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    return _folder_hash(folder, tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache
def _folder_hash(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return stamp_of({name: sha256(folder / name) for name, _, _ in state})


class Stamp(str):
    """A short name for everything that a result depends on, and what that is: `of`, with stamps in it."""

    of: Mapping[str, Any]


def stamp_of(what: Mapping[str, Any]) -> Stamp:
    """A short name for everything that a result depends on; equal exactly if all of it is equal."""
    stamp = Stamp(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16])
    stamp.of = what
    return stamp


def spelled_out(what: Any) -> Any:
    """The same as plain JSON, where every stamp that knows what it is of says so: {"stamp": ..., "of": {...}}."""
    if isinstance(what, Stamp):
        return {"stamp": str(what), "of": spelled_out(what.of)}
    if isinstance(what, Mapping):
        return {key: spelled_out(value) for key, value in what.items()}
    return [spelled_out(value) for value in what] if isinstance(what, list | tuple) else what


def sources_hash(modules: Sequence[str]) -> Stamp:
    """Of this package's modules and packages, e.g. "training/loop" or "report/figures", and of other files.

    Those are folders of text and "a/file.yaml".
    """
    root, hashes = Path(__file__).parents[1], {}
    for module in modules:
        within = sorted(path for kind in ("*.py", "*.txt") for path in (root / module).rglob(kind))
        source = root / (module if module.endswith(".yaml") else f"{module}.py")
        hashes |= {path.relative_to(root).as_posix(): sha256(path) for path in within} or {module: sha256(source)}
    return stamp_of(hashes)
