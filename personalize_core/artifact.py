"""Save what a method learned, and restore it: JSON and safetensors, nothing else."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from personalize_core.base import BaseModel
from personalize_core.concept import Concept
from personalize_core.errors import InputError
from personalize_core.files import read_json, save_tensors, write_json
from personalize_core.method import Method
from personalize_core.methods import method_class
from personalize_core.params import build
from personalize_core.parts import count

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
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


def restore(folder: Path, base: BaseModel) -> Method:
    """The trained method, ready to draw.

    Raises:
        InputError: there is no artifact, it is damaged, or it was trained on another base model.
    """
    saved = _described(folder)
    trained_on = saved["base_model"]
    if saved["format"] != FORMAT:
        raise InputError(
            f"{folder} was written in format {saved['format']}, this version reads {FORMAT}; train it again"
        )
    if trained_on["weights_hash"] != base.weights_hash:
        raise InputError(
            f"{folder} was trained on the base model {trained_on['name']!r} ({trained_on['weights_hash']}), not on "
            f"{base.name!r} ({base.weights_hash}); load that one, or train again"
        )
    kind = method_class(saved["method"])
    config = build(kind.Config, saved["config"], str(folder / CONFIG))
    with torch.random.fork_rng():  # what a method starts from is drawn at random, and replaced at once
        method = kind(config, base, Concept(**saved["concept"]))
    try:
        method.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError):
        raise _damaged(folder) from None
    return method.requires_grad_(False).eval().to(base.device)


def _described(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no artifact; train it first, with `personalize train`")
    try:
        saved = read_json(folder / CONFIG)
    except ValueError:
        raise _damaged(folder) from None
    if not isinstance(saved, dict) or not saved.keys() >= {"format", "method", "concept", "config", "base_model"}:
        raise _damaged(folder)
    return saved


def _damaged(folder: Path) -> InputError:
    return InputError(f"{folder} holds a damaged artifact; remove the folder and train again")
