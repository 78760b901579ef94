"""What differs between the origin of a result and what it would be made from now, in plain words.

A stamp spelled out is a tree: concept images, recipe, sources, and the stamps of other results with theirs. A
difference deep in the tree is reported once, under the name a user knows, with file names and values where they help.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from personalize_core.errors import listed
from personalize_core.files.atomic import FORMAT
from personalize_core.files.stamps import Stamp, spelled_out
from personalize_core.workspace.lineage.records import EDITED

MOST = 6  # details of one kind that are named one by one
EARLIER = "an earlier version of this program made it, which gave its sources and settings other names"
NOT_THERE = "not there"  # stands for a value that one of the two sides lacks


class Difference(NamedTuple):
    """One leaf of the tree that is another by now."""

    path: tuple[str, ...]
    before: Any
    now: Any


def why_stale(manifest: Mapping[str, Any], now: Stamp) -> str | None:
    """Why this result would be made anew; None: it would not, as far as its manifest tells.

    Args:
        manifest: as `manifest_of` gave it; `made_from` is missing where an older version wrote it.
        now: the stamp that it would have if it were made now.
    """
    if manifest["stamp"] == now:
        return None
    if not manifest.get("made_from"):
        return "changed since; an earlier version of this program made it, which kept no list of what it depends on"
    if manifest.get("format") != FORMAT:
        return EARLIER
    return "; ".join(differences(manifest["made_from"], now.of)) or EDITED


def differences(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, each kind of thing once: "recipe changed: lr 0.002 -> 0.1".

    Args:
        made_from: as a manifest recorded it.
        now: what `stamp_of` is given now.
    """
    found: dict[str, dict[str, None]] = {}
    for each in _differing(made_from, spelled_out(now)):
        name, details = _in_words(each)
        found.setdefault(name, {}).update(dict.fromkeys(details))
    return [f"{name} changed" + (f": {_some(list(details))}" if details else "") for name, details in found.items()]


def _differing(before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Every leaf that differs; of a stamp that says what it is of, the leaves of that."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() == now.keys() == {"stamp", "of"}:
            yield from _differing(before["of"], now["of"], path)
            return
        for name in [*before, *(name for name in now if name not in before)]:
            yield from _differing(before.get(name, NOT_THERE), now.get(name, NOT_THERE), (*path, name))
    elif before != now:
        yield Difference(path, before, now)


def _in_words(difference: Difference) -> tuple[str, list[str]]:
    """The kind of thing, and what of it; by the first part of the path that has a name among people."""
    path = difference.path
    place = next((place for place, part in enumerate(path) if part in KINDS), 0)
    name, details = KINDS.get(path[place], (path[place].replace("_", " "), _nothing))
    return name, details(difference._replace(path=path[place:]))


def _nothing(difference: Difference) -> list[str]:
    """Of hashes, lists and long texts."""
    return []


def _file(difference: Difference) -> list[str]:
    verb = "added " if difference.before == NOT_THERE else "removed " if difference.now == NOT_THERE else ""
    return [verb + difference.path[-1]]


def _source(difference: Difference) -> list[str]:
    module = difference.path[-1]
    return [module if "." in module else f"{module}.py"]


def _value(difference: Difference) -> list[str]:
    """Of a short value: before and now, behind its own name where the kind has several."""
    name = f"{difference.path[-1]} " if len(difference.path) > 1 else ""
    return [f"{name}{difference.before} -> {difference.now}"]


def _size(difference: Difference) -> list[str]:
    """In pixels. Where none was asked for a stamp has none, or the hash of what says the base model's own."""
    before, now = (
        f"{side}" if isinstance(side, int) else "the base model's own" for side in (difference.before, difference.now)
    )
    return [f"{before} -> {now}"] if before != now else []


def _options(difference: Difference) -> list[str]:
    """Of dataclasses, which stamps hold as Python writes them: each option that differs."""
    before, now = _fields(difference.before), _fields(difference.now)
    variant = f"{difference.path[-1]} " if len(difference.path) > 1 else ""
    if before is None or now is None:
        return [variant.strip()] if variant else []
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{variant}{name} {before.get(name, NOT_THERE)} -> {now.get(name, NOT_THERE)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _fields(text: Any) -> dict[str, str] | None:
    """ "Config(steps=3, lr=0.1)" -> {"steps": "3", "lr": "0.1"}, within one another "outer.inner"; None: it is none."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, TypeError, ValueError):
        return None
    return dict(_keywords(call)) if isinstance(call, ast.Call) else None


def _keywords(call: ast.Call, within: str = "") -> Iterator[tuple[str, str]]:
    for keyword in call.keywords:
        name = f"{within}{keyword.arg}"
        if isinstance(keyword.value, ast.Call):
            yield from _keywords(keyword.value, f"{name}.")
        else:
            yield name, ast.unparse(keyword.value)


def _within(difference: Difference) -> list[str]:
    """Of what another step made: what differs in that."""
    if len(difference.path) == 1:
        return []
    name, details = _in_words(difference._replace(path=difference.path[1:]))
    return [f"{name} {detail}" for detail in details] or [name]


def _some(details: list[str]) -> str:
    more = len(details) - MOST
    return listed(details) if more <= 0 else f"{', '.join(details[:MOST])} and {more} more"


# What stands in a stamp -> its name among people, and what can be said of it.
KINDS: dict[str, tuple[str, Callable[[Difference], list[str]]]] = {
    "sources": ("code", _source),
    "refining_sources": ("code", _source),
    "base_model": ("base model", _nothing),
    "vae": ("base model", _nothing),
    "image_size": ("image size", _size),
    "class_images": ("class images", _within),
    "files": ("concept images", _file),
    "concept_images": ("concept images", _file),
    "masks": ("masks", _file),
    "held_out": ("held-out images", _nothing),
    "config": ("recipe", _options),
    "preprocessing": ("preprocessing", _value),
    "concept": ("description", _value),
    "templates": ("prompts", _nothing),
    "without_identity": ("prompts", _nothing),
    "variants": ("sampling options", _options),
    "refinement": ("sampling options", _options),
    "guidance": ("sampling options", _options),
    "sampling": ("sampling", _value),
    "seed": ("seed", _value),
    "precision": ("precision", _value),
    "gradient_checkpointing": ("gradient checkpointing", _value),
    "optimizer": ("optimizer", _value),
    "compile": ("compile", _value),
    "class_noun": ("class noun", _value),
    "images": ("number", _value),
    "lists": ("encoders", _nothing),
    "encoders": ("encoders", _nothing),
    "artifact": ("artifact", _nothing),
    "grid": ("images", _nothing),
}
