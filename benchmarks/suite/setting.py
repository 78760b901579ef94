"""What all measurements of one run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.suite.floor import matrix_rate
from benchmarks.suite.models import DTYPES, Precision, Size, Stock, stock
from benchmarks.suite.timing import Deadline
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import method_class, recipe_class
from personalize_core.methods.interface import Method
from personalize_core.methods.recipe import Recipe
from personalize_core.workspace.store import Store

ROOT = Path(__file__).parents[2]
CONCEPT = Concept("teapot1", "<teapot1>", "teapot")


class Models:
    """Weights of one size, for both sides, made when they are first asked for."""

    def __init__(self, size: Size, device: str, precision: Precision) -> None:
        self.size: Size = size
        self.precision: Precision = precision
        self.device = device

    @cached_property
    def parts(self) -> Stock:
        """As loaded, on the CPU; copy them before use."""
        return stock(self.size)

    @cached_property
    def base(self) -> BaseModel:
        """Ours, on the device."""
        return self.parts.copied().base_model(self.size, self.device, self.precision)

    @cached_property
    def rate(self) -> float:
        """Operations a second of matrix products in the precision of the run."""
        return matrix_rate(self.device, DTYPES[self.precision])


@dataclass(frozen=True)
class Setting:
    """Models and amounts of a measurement."""

    models: Models
    rounds: int  # counted ones, of everything
    steps: int  # of a training in one round
    images: int  # sampled, and scored, in one round
    sampling_steps: int
    deadline: Deadline
    uncounted: int = 1  # rounds before those, for what only a first call costs

    @property
    def size(self) -> Size:
        return self.models.size

    @property
    def device(self) -> str:
        return self.models.device

    @property
    def precision(self) -> Precision:
        return self.models.precision

    @property
    def base(self) -> BaseModel:
        return self.models.base

    def recipe(self, method: str) -> Recipe:
        """The published one, and on the miniature what params.yaml makes of it."""
        return Store(ROOT).params.config(method) if self.size == "mini" else recipe_class(method)()

    def method(self, name: str, config: Recipe) -> Method:
        """As its training starts; the same with every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return method_class(name)(config, self.base, CONCEPT)
