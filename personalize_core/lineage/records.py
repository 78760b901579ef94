"""What a result was made from, as its manifest says, against what there is now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personalize_core.files import MANIFEST, read_json, sha256, spelled_out, stamp_of

MOST = 6  # differences that are named one by one


def manifest_of(folder: Path) -> dict[str, Any]:
    """Nothing if there is none, or it is damaged."""
    try:
        found = read_json(folder / MANIFEST)
        return found if isinstance(found["stamp"], str) and isinstance(found["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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


def is_genuine(manifest: Mapping[str, Any]) -> bool:
    """Does what is written there, down to the last hash, give the stamps that are written there?"""
    try:
        return stamp_of(_folded(manifest["made_from"])) == manifest["stamp"]
    except (KeyError, TypeError, ValueError):
        return False


def differences(recorded: Mapping[str, Any], now: Any) -> list[str]:
    """In what the ingredients of a stamp differ from those that it would have now, by their names.

    Args:
        recorded: a manifest's `made_from`.
        now: what `stamp_of` is given now.
    """
    found = sorted(_differing("", recorded, spelled_out(now)))
    return found[:MOST] + ([f"and {len(found) - MOST} more"] if len(found) > MOST else [])


def _folded(what: Any) -> Any:
    """The opposite of `spelled_out`.

    Raises:
        ValueError: a stamp is not that of what stands beside it.
    """
    if isinstance(what, dict):
        if what.keys() == {"stamp", "of"}:
            if (stamp := stamp_of(_folded(what["of"]))) != what["stamp"]:
                raise ValueError(f"{what['stamp']} is not the stamp of what stands there, {stamp}")
            return str(stamp)
        return {key: _folded(value) for key, value in what.items()}
    return [_folded(value) for value in what] if isinstance(what, list) else what


def _differing(place: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() == new.keys() == {"stamp", "of"}:
            yield from _differing(place, old["of"], new["of"])
            return
        for key in old.keys() | new.keys():
            inner = f"{place}.{key}" if place else key
            if key not in new:
                yield f"{inner} is gone"
            elif key not in old:
                yield f"{inner} is new"
            else:
                yield from _differing(inner, old[key], new[key])
    else:
        yield f"{place}{_from_to(old, new)}"


def _from_to(old: Any, new: Any) -> str:
    """Short values are shown, hashes and long ones are not."""
    said = [value if isinstance(value, str) else str(value) for value in (old, new)]
    short = all(len(words) <= 60 and not _is_hash(words) for words in said) and not isinstance(old, dict | list)
    return f": {said[0]} then, {said[1]} now" if short else " is another"


def _is_hash(words: str) -> bool:
    return len(words) in (16, 40, 64) and not set(words) - set("0123456789abcdef")
