"""The names that people read, for those that files, tables and commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from personalize_core.methods import ABLATION_NAMES, MARK, METHOD_NAMES

FILE = "methods/names.yaml"
_READ: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parents[1] / FILE).read_text())
NAMES: dict[str, str] = _READ["methods"] | _READ["ablations"]
SAMPLING: dict[str, str] = _READ["sampling"]


def in_words(name: str) -> str:
    """A method, an ablation or a sampling variant as people call it; any other name, with spaces.

    A variant that is called METHOD_SOMETHING is "Method with something" where that something has a name, else
    "Method: something".
    """
    if name in NAMES:
        return NAMES[name]
    owners = [owner for owner in (*METHOD_NAMES, *ABLATION_NAMES) if name.startswith(f"{owner}_")]
    if owners:
        owner = max(owners, key=len)
        how = name.removeprefix(f"{owner}_")
        return f"{in_words(owner)} with {SAMPLING[how]}" if how in SAMPLING else f"{in_words(owner)}: {_spaced(how)}"
    method, mark, ablation = name.partition(MARK)
    if not mark:
        return _spaced(name)
    return f"{in_words(method)}{' ' if ablation.startswith('without_') else ': '}{_spaced(ablation)}"


def each_in_words(names: str) -> str:
    """The same for each of several that ", " parts, as the numbers of an analysis are called: "core_tto, dino"."""
    return ", ".join(map(in_words, names.split(", ")))


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace(MARK, ": ")
