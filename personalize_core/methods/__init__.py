"""The methods, by name. A new method is one file here and one line below."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from personalize_core.errors import InputError, listed

if TYPE_CHECKING:
    from personalize_core.method import Method

METHODS = {  # name, which is also the file's, -> class; imported when asked for, because that takes torch
    "base_model": "BaseModelAlone",
    "textual_inversion": "TextualInversion",
    "dreambooth": "DreamBooth",
    "custom_diffusion": "CustomDiffusion",
    "ti_db": "TIDB",
    "neti": "NeTI",
    "attn_dreambooth": "AttnDreamBooth",
    "personalized_residuals": "PersonalizedResiduals",
    "oft": "OFT",
    "vico": "ViCo",
    "lora_dreambooth": "LoRADreamBooth",
    "xti": "XTI",
}

METHOD_NAMES = tuple(METHODS)
FLOOR = "base_model"  # learns nothing: what every method must beat


def check_method(name: str) -> None:
    """Raise InputError unless there is such a method; without importing it."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; the methods are {listed(METHODS)}")


def method_class(name: str) -> type[Method]:
    """The class of a method."""
    check_method(name)
    return getattr(importlib.import_module(f"{__name__}.{name}"), METHODS[name])
