"""Which trainings are measured at true shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from personalize_core.methods import METHOD_NAMES, recipe_class

Base = Literal["sd-1.4", "sd-2.1-base"]
Setting = Literal["bf16", "fp32", "bf16+checkpointing"]  # precision, and gradient checkpointing
SETTINGS: tuple[Setting, ...] = get_args(Setting)


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
    """The one of the two that the docstring of the method's recipe names."""
    return "sd-2.1-base" if "2.1-base" in (recipe_class(method).__doc__ or "") else "sd-1.4"


METHODS = tuple(name for name in METHOD_NAMES if recipe_class(name)().training_steps)
# All settings, on the base model of the method's recipe.
EVERY = tuple(Cell(published_base(method), method, setting) for setting in SETTINGS for method in METHODS)
# What every run of the tests measures again: each method in bfloat16, and of the other settings one. `make memory`
# measures all.
MEASURED_AGAIN = (
    *(cell for cell in EVERY if cell.setting == "bf16"),
    Cell("sd-1.4", "textual_inversion", "fp32"),
    Cell("sd-1.4", "dreambooth", "bf16+checkpointing"),
)
