"""The methods, by name. A new method is one file here and one line below."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from personalize_core.errors import InputError, listed

if TYPE_CHECKING:
    from personalize_core.methods.interface import Method

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
    "core": "CoRe",
    "lora_dreambooth": "LoRADreamBooth",
    "xti": "XTI",
}

METHOD_NAMES = tuple(METHODS)
BASELINE = "base_model"  # learns nothing: what every method must beat
MARK = "@"  # METHOD@ABLATION is a method with something changed, and stands wherever a method's name does

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load((Path(__file__).parent / "ablations.yaml").read_text())
"""Method -> ablation -> what it changes in the method's Config."""

ABLATION_NAMES = tuple(f"{method}{MARK}{ablation}" for method, changes in ABLATIONS.items() for ablation in changes)


def check_method(name: str) -> None:
    """Raise InputError unless there is such a method, or such an ablation of it; without importing it."""
    method, _, ablation = name.partition(MARK)
    if method not in METHODS:
        raise InputError(f"there is no method {name!r}; the methods are {listed(METHODS)}")
    if MARK in name and ablation not in ABLATIONS.get(method, {}):
        raise InputError(f"{method} has no ablation {ablation!r}; it has {listed(ABLATIONS.get(method, {})) or 'none'}")


def method_file(name: str) -> str:
    """The name of the file, in this folder, that holds a method or the method that an ablation changes."""
    return name.partition(MARK)[0]


def ablation_changes(name: str) -> dict[str, Any]:
    """What an ablation changes in its method's Config; nothing for a method itself."""
    method, _, ablation = name.partition(MARK)
    return ABLATIONS[method][ablation] if ablation else {}


def method_class(name: str) -> type[Method]:
    """The class of a method, or of the method that an ablation changes."""
    check_method(name)
    file = method_file(name)
    return getattr(importlib.import_module(f"{__name__}.{file}"), METHODS[file])
