"""Which numbers of a recipe a search changes, and how far. The recipe says it; no method is known here by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from personalize_core.errors import InputError
from personalize_core.methods.recipe import Range, Recipe

Changes = Mapping[str, float]  # option of a recipe -> value, for every option of the space
DIGITS = 3  # of a value that is no whole number, so that a section of params.yaml stays readable


def space_of(recipe: Recipe) -> dict[str, Range]:
    """What `Recipe.search_space` says, without options that have no effect in this recipe: it refuses to change those.

    Raises:
        InputError: nothing is left.
    """
    found = {
        name: within
        for name, within in recipe.search_space().items()
        if within.low < within.high and all(_is_allowed(recipe, name, end) for end in (within.low, within.high))
    }
    if not found:
        raise InputError("this recipe has no learning rate and no number of steps that a search could change")
    return found


def of_today(recipe: Any, space: Mapping[str, Range]) -> dict[str, float]:
    return {name: getattr(recipe, name) for name in space}


def rounded(value: float, within: Range) -> float:
    """To a few digits, and still within the range."""
    if isinstance(within.low, int):
        return int(value)
    return min(max(float(f"{value:.{DIGITS - 1}e}"), within.low), within.high)


def with_changes(recipe: Any, changes: Changes) -> Any:
    return replace(recipe, **changes)


def _is_allowed(recipe: Any, name: str, value: float) -> bool:
    try:
        replace(recipe, **{name: value})
    except (InputError, ValueError):  # pydantic's error is a ValueError
        return False
    return True
