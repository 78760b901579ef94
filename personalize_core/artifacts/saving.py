"""Save what a method learned, and restore it: JSON and safetensors, nothing else."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from personalize_core.artifacts.description import CONFIG, FORMAT, WEIGHTS, check, damaged
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.files.atomic import save_tensors, write_json
from personalize_core.files.typed_yaml import build
from personalize_core.methods import method_class, recipe_class
from personalize_core.methods.interface import Method, count

LIBRARIES = ("torch", "diffusers", "transformers")


def save(
    folder: Path, name: str, method: Method, base: BaseModel, seed: int | None, imported: str | None = None
) -> None:
    """Write the artifact of the method called `name` into an existing folder.

    What was not trained here has no seed, and the name of the file that it was imported from.
    """
    save_tensors(folder / WEIGHTS, method.state_dict())
    write_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "method": name,
            "concept": dataclasses.asdict(method.concept),
            "phrase": method.phrase,
            "config": dataclasses.asdict(method.config),
            "parameters": count(method),
            "seed": seed,
            "imported": imported,
            "base_model": describe(base),
            "versions": {library: version(library) for library in LIBRARIES},
        },
    )


def describe(base: BaseModel) -> dict[str, Any]:
    """Which base model, exactly."""
    return {
        "name": base.name,
        "revision": base.revision,
        "weights_hash": base.weights_hash,
        "prediction_type": base.prediction_type,
        "rare_word": base.tokenizer.rare_word,
    }


def restore(folder: Path, base: BaseModel, method: str | None = None) -> Method:
    """What was trained, ready to sample.

    Args:
        method: whose artifact it has to be; if not given, any method's.

    Raises:
        InputError: there is no artifact, it is damaged, or it is of another base model or method.
    """
    saved = check(folder, method, base.name, base.weights_hash)
    kind = method_class(saved["method"])
    config = build(recipe_class(saved["method"]), saved["config"], str(folder / CONFIG))
    try:
        with torch.device("meta"):  # what a method starts from is replaced at once, so none of it is computed
            trained = kind(config, base, Concept(**saved["concept"]))
        trained.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (OSError, SafetensorError, RuntimeError, TypeError):
        raise damaged(folder) from None
    return trained.requires_grad_(False).eval().to(base.device)
