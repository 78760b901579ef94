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


def published_base(method: str) -> Base:
    """The one of the two that the defaults of the method's recipe are for."""
    return "sd-2.1-base" if "2.1-base" in (recipe_class(method).__doc__ or "") else "sd-1.4"


TRAINED = tuple(name for name in METHOD_NAMES if recipe_class(name)().training_steps)
EVERY = tuple(
    Cell(base, method, setting)
    for base, method, setting in itertools.product(get_args(Base), TRAINED, get_args(Setting))
)

# Measured again by every run of the tests: each method on the base model of its recipe, in bfloat16, and of the other
# settings and base models one each. `make memory` measures all.
MEASURED_AGAIN = (
    *(cell for cell in EVERY if cell.setting == "bf16" and cell.base == published_base(cell.method)),
    Cell("sd-1.4", "textual_inversion", "fp32"),
    Cell("sd-1.4", "dreambooth", "bf16+checkpointing"),
    Cell("sd-2.1-base", "lora_dreambooth", "bf16"),
)
