"""params.yaml, variants: the ways to sample what a method learned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from personalize_core.errors import InputError, listed, shown
from personalize_core.files.typed_yaml import Values, build, keys_of, unknown_key
from personalize_core.methods import RECIPES
from personalize_core.methods.recipe import Recipe
from personalize_core.methods.shared.options import (
    ConsistencyGuidance,
    PersonalizationGuidance,
    Refinement,
    WeightGuidance,
)

NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,99}")


@dataclass(frozen=True)
class Strategy:
    """A way of sampling that stands beside a method's own sampling options, apart from any method."""

    options: Any
    does: str
    applies: Callable[[Recipe], bool]
    why_not: Callable[[Recipe], str]


def _by_weights(recipe: Recipe) -> bool:
    return recipe.samples_by_weights


def _no_weights(recipe: Recipe) -> str:
    return "it does not sample by weights that take the place of the base model's"


REFINE = "test_time_optimization"
STRATEGIES = {
    REFINE: Strategy(
        Refinement,
        "refines the one text embedding that was learned, for each prompt",
        lambda recipe: recipe.text_embeddings == 1,
        lambda recipe: f"it learns {recipe.text_embeddings or 'none'}",
    ),
    "personalization_guidance": Strategy(
        PersonalizationGuidance,
        "takes the prompt-free half of guidance from weights between the base model's and the learned ones",
        _by_weights,
        _no_weights,
    ),
    "consistency_guidance": Strategy(
        ConsistencyGuidance,
        "guides the base model, and goes from there towards what was learned",
        _by_weights,
        _no_weights,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to sample what a method learned, without training it again."""

    name: str
    sampling: Any  # the method's own options
    refinement: Refinement | None = None  # test-time optimization, apart from any method; None: not wanted
    guidance: WeightGuidance | None = None  # likewise


def checked_variant(name: str, method: str, config: Any, options: Values) -> Variant:
    variant = variant_of(name, method, config, options)
    try:
        config.check(variant.sampling)
    except InputError as error:
        raise InputError(f"{_place(method, name)}: {error}") from None
    return variant


def variant_of(name: str, method: str, config: Any, options: Values, spelling_alone: bool = False) -> Variant:
    """A variant whose options are known and take their values.

    With `spelling_alone` a strategy is known whether it applies under this config or not.
    """
    kind, where = config.Sampling, _place(method, name)
    applying = [strategy for strategy, described in STRATEGIES.items() if described.applies(config)]
    known = [*keys_of(kind), *applying]
    for option in options:
        if option not in known and not (spelling_alone and option in STRATEGIES):
            raise InputError(f"{where}: {_inapplicable(option, method, config) or unknown_key(option, known)}")
    sampling = build(kind, {key: value for key, value in options.items() if key not in STRATEGIES}, where)
    chosen = {key: _strategy(key, options[key], f"{where}.{key}") for key in STRATEGIES if key in options}
    refinement, guidances = chosen.pop(REFINE, None), list(chosen)
    if len(guidances) > 1:
        raise InputError(f"{where}: {listed(guidances)} both say how it is guided; leave one out")
    if guidances and getattr(sampling, "lag", False):
        raise InputError(
            f"{where}: {guidances[0]} needs weights that take the place of the base model's, and lag keeps what was "
            "learned beside them; leave one out"
        )
    return Variant(name, sampling, refinement, *chosen.values())


def _place(method: str, variant: str) -> str:
    return f"params.yaml, variants.{method}.{variant}"


def _strategy(key: str, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} = {shown(values)}: it should be options, or {{}} for the published ones")
    return build(STRATEGIES[key].options, values, where)


def _inapplicable(option: str, method: str, config: Any) -> str | None:
    """What a sampling option of other methods does, why it does not apply to this one, and which have it."""
    published = {name: recipe() for name, recipe in RECIPES.items()}
    if described := STRATEGIES.get(option):
        having = [name for name, recipe in published.items() if described.applies(recipe)]
        does, why = described.does, described.why_not(config)
    else:
        having = [name for name, recipe in published.items() if option in keys_of(recipe.Sampling)]
        if not having:
            return None
        fields: Any = published[having[0]].Sampling
        does, why = fields.__pydantic_fields__[option].description, config.lacks.get(option)
    return f"{option} {does}, and does not apply to {method}{f': {why}' if why else ''}; it applies to {listed(having)}"
