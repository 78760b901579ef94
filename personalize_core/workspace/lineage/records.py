"""What a manifest says of a result: is it there, whole, and as the step wrote it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize_core.files.atomic import MANIFEST, read_json, read_record
from personalize_core.files.stamps import sha256, stamp_of

DAMAGED = "its manifest is missing or damaged"
EDITED = "its manifest has been edited: its stamp is not that of what it says"


def manifest_of(folder: Path) -> dict[str, Any]:
    """Nothing if there is none, or it is damaged."""
    try:
        found = read_json(folder / MANIFEST)
        whole = isinstance(found["stamp"], str) and isinstance(found.get("made_from", {}), dict)
        return found if whole and all(isinstance(entry["sha256"], str) for entry in found["files"].values()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def as_written(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a result; nothing if it holds other bytes than its step wrote, and so any values."""
    entry, path = manifest_of(folder).get("files", {}).get(name), folder / name
    return read_record(path) if entry and path.is_file() and sha256(path) == entry["sha256"] else {}


def file_problems(folder: Path, manifest: Mapping[str, Any], only: str | None = None) -> list[str]:
    """Files that are gone, or are other bytes than the step wrote; of all, or of one."""
    problems = []
    for name, entry in manifest["files"].items():
        if only is not None and name != only:
            continue
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is gone")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{name} has been changed since it was made: its sha256 is another")
    return problems


def files_trained_on(artifact: Path) -> dict[str, str]:
    """File name -> sha256 of the concept images that an artifact was trained on; nothing where its manifest does not
    say, as with what was imported."""
    made_from = manifest_of(artifact).get("made_from", {})
    try:
        original = made_from["again"]["of"] if "again" in made_from else made_from
        return {name: str(digest) for name, digest in original["latents"]["of"]["files"].items()}
    except (KeyError, TypeError, AttributeError):
        return {}


def is_genuine(manifest: Mapping[str, Any]) -> bool:
    """Does what is written there, down to the last hash, give the stamps that are written there?"""
    try:
        return stamp_of(folded(manifest["made_from"])) == manifest["stamp"]
    except (KeyError, TypeError, ValueError):
        return False


def folded(what: Any) -> Any:
    """The opposite of `spelled_out`: a stamp alone in place of all that it is of.

    Raises:
        ValueError: a stamp is not that of what stands beside it.
    """
    if isinstance(what, dict):
        if what.keys() == {"stamp", "of"}:
            if (stamp := stamp_of(folded(what["of"]))) != what["stamp"]:
                raise ValueError(f"{what['stamp']} is not the stamp of what stands there, {stamp}")
            return str(stamp)
        return {key: folded(value) for key, value in what.items()}
    return [folded(value) for value in what] if isinstance(what, list) else what
