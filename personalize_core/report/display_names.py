"""The names that people read, for those that files, tables and commands have."""

from __future__ import annotations

from collections.abc import Iterable

from personalize_core.methods import MARK, RECIPES, method_of
from personalize_core.methods.shared.options import STRATEGY_NAMES

NAMES: dict[str, str] = {name: recipe.display_name for name, recipe in RECIPES.items()} | {
    f"{name}{MARK}{ablation}": described.display_name
    for name, recipe in RECIPES.items()
    for ablation, described in recipe.ablations.items()
    if described.display_name
}


def in_words(name: str) -> str:
    """A method, an ablation or a sampling variant as people call it; any other name, with spaces.

    A variant that is called METHOD_SOMETHING, or METHOD@ABLATION_SOMETHING, is "Method with something" where that
    something has a name; else the former is "Method: something", as an ablation without a name is.
    """
    if name in NAMES:
        return NAMES[name]
    for suffix, strategy in STRATEGY_NAMES.items():
        owner = name.removesuffix(f"_{suffix}")
        if owner != name and method_of(owner) in RECIPES:
            return f"{in_words(owner)} with {strategy}"
    method, mark, ablation = name.partition(MARK)
    if mark:
        return f"{in_words(method)}{' ' if ablation.startswith('without_') else ': '}{_spaced(ablation)}"
    owners = [owner for owner in RECIPES if name.startswith(f"{owner}_")]
    if owners:
        owner = max(owners, key=len)
        return f"{in_words(owner)}: {_spaced(name.removeprefix(f'{owner}_'))}"
    return _spaced(name)


def each_in_words(names: str) -> str:
    """The same for each of several that ", " separates, as the metrics of an analysis are called: "core_tto, dino"."""
    return ", ".join(map(in_words, names.split(", ")))


def of(names: Iterable[str]) -> dict[str, str]:
    """Name -> what people call it, of each once: for stamps of what shows them."""
    return {name: in_words(name) for name in dict.fromkeys(names)}


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace(MARK, ": ")
