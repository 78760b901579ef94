"""What stands behind a result, on its materialization: short, with the command that shows all of it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from personalize_core.steps import Link, Report
    from personalize_core.workspace.store import Store

Metadata = dict[str, dg.MetadataValue]


def behind(store: Store, report: Report, most: int | None = None, **inputs: Path) -> Metadata:
    """The chain of a result, the DVC hashes of its inputs, and the command for all of it.

    Nothing is read but manifests and the inputs' bytes; whether all is still as it was made, the command tells.

    Args:
        most: bytes of an input whose hash is taken; None: of any.
        inputs: files and folders that it was made from, by the names of their assets.
    """
    from personalize_core import steps
    from personalize_core.errors import InputError

    found: Metadata = {
        f"dvc/{name}": dg.MetadataValue.text(digest)
        for name, path in inputs.items()
        if (most is None or _size(path) <= most) and (digest := dvc_hash(path))
    }
    folder = report.path.parent if report.path.is_file() else report.path
    try:
        link = steps.explain(store, folder, verify=False)
    except InputError:  # class images of a noun, and whatever is no single result
        return found
    command = dg.MetadataValue.text(f"personalize explain {shlex.quote(link.path)}")
    return {"made_from": dg.MetadataValue.md("\n".join(_lines(link, 0, set()))), "explain": command, **found}


def plain(text: str) -> str:
    """Markdown that shows the text as it is: file names may hold what Markdown would take for an image or a link."""
    return re.sub(r"([\\`*_{}\[\]<>#!|~])", r"\\\1", text)


def _lines(link: Link, depth: int, shown: set[str]) -> list[str]:
    """A line for each link: what it is, its stamp, and how it was made."""
    if link.path in shown:
        return []
    shown.add(link.path)
    parts = [link.facts[name] for name in ("stamp", "weights_hash") if name in link.facts]
    if "seed" in link.facts:
        parts.append(f"seed {link.facts['seed']}")
    if files := link.facts.get("sha256"):
        parts.append(", ".join(f"{name} {digest[:8]}" for name, digest in files.items()))
    if code := link.making.get("code"):
        parts.append(f"git {code['commit'][:8]}{' with changes' if code['changed_since'] else ''}")
    if "finished" in link.making:
        parts.append(f"{link.making['finished']} on {link.making['device'] or 'a CPU'}")
    told = [*map(plain, parts), *(f"**{plain(problem)}**" for problem in link.problems)]
    line = f"{'  ' * depth}- {plain(f'{link.what} {link.path}')}: {'; '.join(told)}"
    return [line, *(further for each in link.inputs for further in _lines(each, depth + 1, shown))]


def dvc_hash(path: Path) -> str | None:
    """The md5 by which DVC knows a file or folder, from the bytes that are there; None if nothing is.

    The very string that stands in dvc.lock or in a .dvc file. For a folder, of the list of its files; what .dvcignore
    leaves out, unfinished files, is left out here.
    """
    if path.is_file():
        return _md5(path)
    if not path.is_dir():
        return None
    listing = sorted(
        ({"md5": _md5(each), "relpath": each.relative_to(path).as_posix()} for each in _files(path)),
        key=lambda entry: entry["relpath"],
    )
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [each for each in path.rglob("*") if each.is_file() and not _ignored(each.relative_to(path))]


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in _files(path))


def _ignored(path: Path) -> bool:
    return any(part == "__pycache__" or (part.startswith(".") and part.endswith(".tmp")) for part in path.parts)


def _md5(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
