"""Which trainings are measured at true shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from personalize_core.methods import METHOD_NAMES, recipe_class

Base = Literal["sd-1.4", "sd-2.1-base", "sdxl-base-1.0"]
# Precision, gradient checkpointing, and whether a step has one image of the concept where the recipe has more.
Setting = Literal["bf16", "fp32", "bf16+checkpointing", "bf16+checkpointing+one"]
SETTINGS: tuple[Setting, ...] = ("bf16", "fp32", "bf16+checkpointing")
XL: Base = "sdxl-base-1.0"
XL_SETTINGS: tuple[Setting, ...] = ("bf16", "bf16+checkpointing+one")


@dataclass(frozen=True, order=True)
class Cell:
    """A method with its published recipe on a base model of true shapes, at the model's own image size."""

    base: Base
    method: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.method} {self.base} {self.setting}"

    @property
    def checkpointing(self) -> bool:
        return "+checkpointing" in self.setting

    @property
    def one_image(self) -> bool:
        return self.setting.endswith("+one")

    @property
    def precision(self) -> str:
        return self.setting.partition("+")[0]


def published_base(method: str) -> Base:
    """The Stable Diffusion 1 or 2 that the docstring of the method's recipe names."""
    return "sd-2.1-base" if "2.1-base" in (recipe_class(method).__doc__ or "") else "sd-1.4"


METHODS = tuple(name for name in METHOD_NAMES if recipe_class(name)().training_steps)
ON_XL = tuple(name for name in METHODS if not recipe_class(name)().needs_one_text_encoder)
# All settings, on the base model of the method's recipe, and on Stable Diffusion XL.
EVERY = (
    *(Cell(published_base(method), method, setting) for setting in SETTINGS for method in METHODS),
    *(Cell(XL, method, setting) for setting in XL_SETTINGS for method in ON_XL),
)
# What every run of the tests measures again: each method in bfloat16, and some others. `make memory` measures all.
MEASURED_AGAIN = (
    *(cell for cell in EVERY if cell.setting == "bf16" and cell.base != XL),
    Cell("sd-1.4", "textual_inversion", "fp32"),
    Cell("sd-1.4", "dreambooth", "bf16+checkpointing"),
    Cell(XL, "textual_inversion", "bf16"),
    Cell(XL, "lora_dreambooth", "bf16+checkpointing+one"),
)
