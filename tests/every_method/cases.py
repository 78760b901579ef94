"""Every method, with every value of every switch, for tests of what is true of all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from pydantic import ValidationError

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import METHOD_NAMES, method_class, recipe_class
from personalize_core.methods.interface import Method
from tests.conftest import tiny_base, tiny_xl

Kind = Literal["convolutional", "linear", "xl"]
"""Stable Diffusion 1, whose transformers have 1x1 convolutions around them; 2, where these are linear layers; XL."""

STEPS = 2  # of every stage
ROWS = 2  # images of the concept in a step


def options_of(kind: Any) -> dict[str, tuple]:
    """Those options of a Config or Sampling that are a switch or a choice from a list, with their values."""
    hints = get_type_hints(kind)
    switches = {name: (False, True) for name, hint in hints.items() if hint is bool}
    return switches | {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def base_of(kind: Kind, **options) -> BaseModel:
    return tiny_xl(**options) if kind == "xl" else tiny_base(kind == "linear", **options)


def kinds_of(name: str) -> list[Kind]:
    """The kinds of base model that a method's defaults are defined on."""
    return ["convolutional", "linear", *["xl"] * (not recipe_class(name)().needs_one_text_encoder)]  # type: ignore[list-item]


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, with one choice of its switches and few steps, on one kind of base model."""

    name: str
    kind: Kind
    chosen: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, self.kind, *(f"{option}={value}" for option, value in self.chosen)])

    @property
    def moved(self) -> float:
        """How far tests move what is learned that compare two computations of the same, by `disturbed`.

        Less on the tiny XL: its weights are random, and a larger change of its two blocks in a row multiplies rounding
        beyond the tests' bounds.
        """
        return 0.1 if self.kind == "xl" else 0.3

    def base(self, **options) -> BaseModel:
        return base_of(self.kind, **options)

    def make(self, base: BaseModel, concept: Concept, seed: int = 0, steps: int = STEPS) -> Method:
        kind: Any = method_class(self.name)
        fields = [field.name for field in dataclasses.fields(kind.Config)]
        short = {name: steps for name in fields if name.endswith("steps")}
        short |= {name: ROWS for name in fields if name.endswith("batch_size")}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return kind(kind.Config(**short, **dict(self.chosen)), base, concept)


def cases_of(name: str) -> list[Case]:
    """The defaults on all kinds of base models, then every other value of every switch, one at a time."""
    config = recipe_class(name)
    choices = [(option, value) for option, values in options_of(config).items() for value in values]
    others = [(option, value) for option, value in choices if getattr(config(), option) != value]
    return [*(Case(name, kind) for kind in kinds_of(name)), *(Case(name, "convolutional", (each,)) for each in others)]


def samplings_of(name: str) -> list[dict[str, Any]]:
    """Every combination of a method's sampling options, but those that contradict each other."""
    kind: Any = recipe_class(name).Sampling
    options, combinations = options_of(kind), []
    for values in itertools.product(*options.values()):
        with contextlib.suppress(ValidationError):
            chosen = dict(zip(options, values, strict=True))
            kind(**chosen)
            combinations.append(chosen)
    return combinations


CONCEPT = Concept("v", "<v>", "dog")
DEFAULT = [Case(name, kind) for name in METHOD_NAMES for kind in kinds_of(name)]
ALL = [case for name in METHOD_NAMES for case in cases_of(name)]
STARTING = [case for case in DEFAULT if recipe_class(case.name)().starts_as_base_model]
ALIKE = [case for case in DEFAULT if recipe_class(case.name)().samples_as_it_trains]
TRAINED = {case.name for case in DEFAULT if case.make(case.base(), CONCEPT).stages()}
LEARNING = [case for case in ALL if case.name in TRAINED]
SAMPLINGS = [(case, options) for case in DEFAULT for options in samplings_of(case.name)]

of_all = pytest.mark.parametrize("case", ALL, ids=str)
of_default = pytest.mark.parametrize("case", DEFAULT, ids=str)
of_alike = pytest.mark.parametrize("case", ALIKE, ids=str)
of_starting = pytest.mark.parametrize("case", STARTING, ids=str)
of_learning = pytest.mark.parametrize("case", LEARNING, ids=str)
trained_once = pytest.mark.parametrize("case", LEARNING, ids=str, scope="module")  # for tests that share a training
of_samplings = pytest.mark.parametrize(("case", "options"), SAMPLINGS, ids=str)


class CutOff(Exception):
    """As a machine that goes down."""
