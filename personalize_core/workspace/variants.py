"""params.yaml, variants: the ways to sample what a method learned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from personalize_core.errors import InputError, listed, shown
from personalize_core.files.typed_yaml import Values, build, keys_of, unknown_key
from personalize_core.methods import RECIPES
from personalize_core.methods.shared.options import Refinement

NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,99}")
REFINE = "test_time_optimization"  # stands beside a method's own sampling options


@dataclass(frozen=True)
class Variant:
    """One way to sample what a method learned, without training it again."""

    name: str
    sampling: Any  # the method's own options
    refinement: Refinement | None = None  # test-time optimization, apart from any method; None: not wanted


def checked_variant(name: str, method: str, config: Any, options: Values) -> Variant:
    variant = variant_of(name, method, config, options)
    try:
        config.check(variant.sampling)
    except InputError as error:
        raise InputError(f"{_place(method, name)}: {error}") from None
    return variant


def variant_of(name: str, method: str, config: Any, options: Values, spelling_alone: bool = False) -> Variant:
    """A variant whose options are known and take their values.

    With `spelling_alone` test-time optimization is known whether it applies under this config or not.
    """
    kind, where = config.Sampling, _place(method, name)
    known = [*keys_of(kind), *([REFINE] if config.text_embeddings == 1 else [])]
    for option in options:
        if option not in known and not (spelling_alone and option == REFINE):
            raise InputError(f"{where}: {_inapplicable(option, method, config) or unknown_key(option, known)}")
    sampling = build(kind, {key: value for key, value in options.items() if key != REFINE}, where)
    return Variant(name, sampling, _refinement(options[REFINE], f"{where}.{REFINE}") if REFINE in options else None)


def _place(method: str, variant: str) -> str:
    return f"params.yaml, variants.{method}.{variant}"


def _refinement(values: Any, where: str) -> Refinement:
    if not isinstance(values, dict):
        raise InputError(f"{where} = {shown(values)}: it should be options, or {{}} for the published ones")
    return build(Refinement, values, where)


def _inapplicable(option: str, method: str, config: Any) -> str | None:
    """What a sampling option of other methods does, why it does not apply to this one, and which have it."""
    published = {name: recipe() for name, recipe in RECIPES.items()}
    if option == REFINE:
        having = [name for name, recipe in published.items() if recipe.text_embeddings == 1]
        does = "refines the one text embedding that was learned, for each prompt"
        why = f"it learns {config.text_embeddings or 'none'}"
    else:
        having = [name for name, recipe in published.items() if option in keys_of(recipe.Sampling)]
        if not having:
            return None
        fields: Any = published[having[0]].Sampling
        does, why = fields.__pydantic_fields__[option].description, config.lacks.get(option)
    return f"{option} {does}, and does not apply to {method}{f': {why}' if why else ''}; it applies to {listed(having)}"
