"""What all measurements of one run have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.suite.floor import matrix_rate
from benchmarks.suite.models import DTYPES, Precision, Size, Stock, stock
from benchmarks.suite.timing import Deadline, Measured, load
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

    def recipe(self, method: str) -> Recipe:
        """The published one, and on the miniature what params.yaml makes of it."""
        return Store(ROOT).params.config(method) if self.models.size == "mini" else recipe_class(method)()

    def method(self, name: str, config: Recipe) -> Method:
        """As its training starts; the same with every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return method_class(name)(config, self.models.base, CONCEPT)

    def measured(
        self,
        part: str,
        what: str,
        theirs: str,
        unit: str,
        times: Mapping[str, Sequence[float]],
        *,
        units: int = 1,
        flops: float | None = None,
        apart: float | None = None,
        about: str = "",
    ) -> Measured:
        """A row of the table, whose floor is that of `flops` at the device's matrix rate.

        Args:
            times: of "ours" and "theirs", round by round, as `take_turns` returns them.
            units: of which so many were made in a round.
        """
        ours, others = ([seconds / units for seconds in times[who]] for who in ("ours", "theirs"))
        floor = None if flops is None else flops / self.models.rate
        return Measured(part, what, theirs, unit, ours, others, flops, floor, apart, load(), about)
