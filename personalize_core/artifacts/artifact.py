"""Save what a method learned, and restore it: JSON and safetensors, nothing else."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json, save_tensors, write_json
from personalize_core.files.typed_yaml import build
from personalize_core.methods import method_class
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.parts import count

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


def check(folder: Path, method: str | None, base_model: str, weights_hash: str) -> dict[str, Any]:
    """What the artifact's description says.

    Raises:
        InputError: there is no artifact, its description is damaged, or it is of another base model or method.
    """
    saved = _described(folder)
    trained_on = saved["base_model"]
    if saved["format"] != FORMAT:
        raise InputError(
            f"{folder} was written in format {saved['format']}, this version reads {FORMAT}; train it again"
        )
    if method is not None and saved["method"] != method:
        raise InputError(
            f"{folder} holds what {saved['method']} has learned, not {method}; put it where {saved['method']}'s "
            f"artifacts lie, or remove it and train {method}"
        )
    if trained_on["weights_hash"] != weights_hash:
        again = "remove it and import again" if saved.get("imported") else "train again"
        raise InputError(
            f"{folder} was trained on the base model {trained_on['name']!r} ({trained_on['weights_hash']}), not on "
            f"{base_model!r} ({weights_hash}); load that one, or {again}"
        )
    return saved


def restore(folder: Path, base: BaseModel, method: str | None = None) -> Method:
    """What was trained, ready to draw.

    Args:
        method: whose artifact it has to be; if not given, any method's.

    Raises:
        InputError: there is no artifact, it is damaged, or it is of another base model or method.
    """
    saved = check(folder, method, base.name, base.weights_hash)
    kind = method_class(saved["method"])
    config = build(kind.Config, saved["config"], str(folder / CONFIG))
    with torch.random.fork_rng():  # what a method starts from is drawn at random, and replaced at once
        trained = kind(config, base, Concept(**saved["concept"]))
    try:
        trained.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError):
        raise _damaged(folder) from None
    return trained.requires_grad_(False).eval().to(base.device)


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
