"""The names that people read, for those that files, tables and commands have."""

from __future__ import annotations

from collections.abc import Iterable

from personalize_core.methods import ABLATION_NAMES, MARK, METHOD_NAMES, RECIPES
from personalize_core.methods.shared.options import STRATEGY_NAMES

NAMES: dict[str, str] = {name: recipe.display_name for name, recipe in RECIPES.items()} | {
    f"{name}{MARK}{ablation}": described.display_name
    for name, recipe in RECIPES.items()
    for ablation, described in recipe.ablations.items()
    if described.display_name
}


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
        strategy = STRATEGY_NAMES.get(how)
        return f"{in_words(owner)} with {strategy}" if strategy else f"{in_words(owner)}: {_spaced(how)}"
    method, mark, ablation = name.partition(MARK)
    if not mark:
        return _spaced(name)
    return f"{in_words(method)}{' ' if ablation.startswith('without_') else ': '}{_spaced(ablation)}"


def each_in_words(names: str) -> str:
    """The same for each of several that ", " separates, as the metrics of an analysis are called: "core_tto, dino"."""
    return ", ".join(map(in_words, names.split(", ")))


def of(names: Iterable[str]) -> dict[str, str]:
    """Name -> what people call it, of each once: for stamps of what shows them."""
    return {name: in_words(name) for name in dict.fromkeys(names)}


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace(MARK, ": ")
