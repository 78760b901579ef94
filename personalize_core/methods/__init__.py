"""The methods, by name: each is a folder here with `recipe.py` and `method.py`, and is found by being there.

docs/adding_a_method.md says how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.errors import InputError, listed
from personalize_core.methods.recipe import Ablation

if TYPE_CHECKING:
    from personalize_core.methods.interface import Method
    from personalize_core.methods.recipe import Recipe


def _found() -> dict[str, type[Recipe]]:
    """Folder -> its recipe, in the order of their papers; what has no paper comes first."""
    names = [path.parent.name for path in Path(__file__).parent.glob("*/recipe.py")]
    recipes = {name: importlib.import_module(f"{__name__}.{name}.recipe").Config for name in names}
    return dict(sorted(recipes.items(), key=lambda item: (item[1].arxiv, item[0])))


RECIPES: dict[str, type[Recipe]] = _found()
METHOD_NAMES = tuple(RECIPES)
BASELINE = "base_model"  # learns nothing: what every method must beat
MARK = "@"  # METHOD@ABLATION is a method with some of its configuration changed, and is used like a method's name

# What every method has that is trained, beside its recipe's ablations.
PRESETS: dict[str, Ablation] = {"adaptive": Ablation({"adaptive": {}})}


def is_trained(method: str) -> bool:
    """Are there steps in its recipe? Not so of the base model, and of what a pretrained network does by itself."""
    return any(option.name.endswith("steps") for option in fields(RECIPES[method]))


def ablations_of(method: str) -> dict[str, Ablation]:
    """Of a method itself, by their names behind METHOD@."""
    return {**RECIPES[method].ablations, **(PRESETS if is_trained(method) else {})}


ABLATION_NAMES = tuple(f"{name}{MARK}{ablation}" for name in RECIPES for ablation in ablations_of(name))


def known_methods(own: Iterable[str] = ()) -> list[str]:
    """The methods, the ablations of their recipes, and further METHOD@ABLATION names."""
    return list(dict.fromkeys((*METHOD_NAMES, *ABLATION_NAMES, *own)))


def check_method(name: str, own: Iterable[str] = ()) -> None:
    """Raise InputError unless it is one of `known_methods`."""
    method, _, ablation = name.partition(MARK)
    if method not in RECIPES:
        raise InputError(f"there is no method {method!r}; the methods are {listed(METHOD_NAMES)}")
    known = known_methods(own)
    if name not in known:
        there = [each.partition(MARK)[2] for each in known if each.startswith(f"{method}{MARK}")]
        raise InputError(
            f"{method} has no ablation {ablation!r}; it has {listed(there) or 'none'}; to add it, write a section "
            f"{name} under `ablations` in params.yaml"
        )


def method_of(name: str) -> str:
    """The method itself, or the one that an ablation changes."""
    return name.partition(MARK)[0]


def method_source(name: str) -> str:
    """The module, by its path within this package, whose source an artifact depends on.

    The recipe's source is not among them: what training computes with are the values of its fields.
    """
    return f"methods/{method_of(name)}/method"


def ablation_changes(name: str) -> dict[str, Any]:
    """What an ablation of a recipe changes in its method's Config; nothing for any other name."""
    method, _, ablation = name.partition(MARK)
    known = ablations_of(method)
    return dict(known[ablation].changes) if ablation in known else {}


def recipe_class(name: str) -> type[Recipe]:
    """The Config of a method, or of the method that an ablation changes; torch is not imported for it."""
    check_method(method_of(name))
    return RECIPES[method_of(name)]


def method_class(name: str) -> type[Method]:
    """The class of a method, or of the method that an ablation changes; imports its module, and torch."""
    from personalize_core.methods.interface import Method

    check_method(method_of(name))
    module = importlib.import_module(f"{__name__}.{method_of(name)}.method")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Method)]
    own = [kind for kind in kinds if kind.__module__ == module.__name__]
    if len(own) != 1:
        raise TypeError(f"{module.__file__} must define one subclass of Method; it defines {len(own)}")
    return own[0]
