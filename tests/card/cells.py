"""Which trainings are measured at true shapes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

from personalize_core.methods import METHOD_NAMES, recipe_class

Base = Literal["sd-1.4", "sd-2.1-base"]
Setting = Literal["fp32", "bf16", "bf16+checkpointing"]  # precision, and gradient checkpointing


@dataclass(frozen=True, order=True)
class Cell:
    """A method with its published recipe on a base model of true shapes."""

    base: Base
    method: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.method} {self.base} {self.setting}"

    @property
    def checkpointing(self) -> bool:
        return self.setting.endswith("+checkpointing")

    @property
    def precision(self) -> str:
        return self.setting.partition("+")[0]

    @property
    def published(self) -> bool:
        """Is this the base model that the method's recipe is for?"""
        return self.base == published_base(self.method)


def published_base(method: str) -> Base:
    """The one of the two that the docstring of the method's recipe names."""
    return "sd-2.1-base" if "2.1-base" in (recipe_class(method).__doc__ or "") else "sd-1.4"


METHODS = tuple(name for name in METHOD_NAMES if recipe_class(name)().training_steps)
# All settings on the base model of the method's recipe; on the other one bfloat16.
EVERY = tuple(
    cell
    for published, setting in ((True, "bf16"), (True, "fp32"), (True, "bf16+checkpointing"), (False, "bf16"))
    for cell in itertools.starmap(Cell, itertools.product(get_args(Base), METHODS, [setting]))
    if cell.published == published
)
# What every run of the tests measures again: each method in bfloat16 on the base model of its recipe, and of the others
# a few. `make memory` measures all.
MEASURED_AGAIN = (
    *(cell for cell in EVERY if cell.published and cell.setting == "bf16"),
    Cell("sd-1.4", "textual_inversion", "fp32"),
    Cell("sd-1.4", "dreambooth", "bf16+checkpointing"),
    Cell("sd-2.1-base", "lora_dreambooth", "bf16"),
)
