"""A workspace for each recipe that a search tries: what people put there is the user's, what steps make is its own.

So nothing of a search lands among the user's results, and a concept that is held back is not even there. What depends
on no recipe, latents and class images, is shared with the user's workspace, and so are its locks: two searches, or a
search and a run, take turns at these and at the device.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import folder_aside, write_bytes
from personalize_core.files.outside import read_yaml
from personalize_core.methods import MARK
from personalize_core.tuning.space import Changes
from personalize_core.workspace.params import Params
from personalize_core.workspace.store import Store

SHARED = (
    "prompts",
    "protocols",
    "regularization",
    "latents",
    "class_images",
    ".work/locks",
    "analyses/class_nouns",  # from which a recipe may take the noun that it says
)
RESULTS = ("artifacts", "grids", "metrics", "costs", "repeats", "under", ".work/checkpoints", ".work/features")


def scratch(store: Store, root: Path, method: str, variant: str, changes: Changes, concepts: Sequence[str]) -> Store:
    """The workspace of one recipe, with these concepts beside those that it has already."""
    for name in ("latents", "class_images", ".work/locks"):
        (store.data / name).mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        _link(root / "data" / name, store.data / name)
    values = changed(read_yaml(store.root / "params.yaml"), store.params, method, variant, changes)
    write_bytes(root / "params.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    for name in concepts:
        _copy(store.concept_folder(name), root / "data" / "concepts" / name)
    return Store(root, store.protocol)


def changed(values: dict[str, Any], params: Params, method: str, variant: str, changes: Changes) -> dict[str, Any]:
    """The content of params.yaml for a trial: its recipe, one sampling variant, and the scores that the balance needs.

    A protocol has encoders of its own, which stay.
    """
    section, recipe = recipe_section(params, method, changes)
    values[section] = values.get(section) or {}
    values[section] = {**values[section], method: {**(values[section].get(method) or {}), params.base_model: recipe}}
    options = (params.variants.get(method) or {method: {}})[variant]
    first = params.encoders
    values["variants"] = {**(values.get("variants") or {}), method: {variant: options}}
    values["encoders"] = {
        "text_image": [first.text_image[0]],
        "identity": [first.identity[0]],
        "texts": ["class_phrase"],
    }
    return {key: value for key, value in values.items() if key not in ("judge", "automation", "baseline")}


def recipe_section(params: Params, method: str, changes: Changes) -> tuple[str, dict[str, Any]]:
    """Where params.yaml has what a recipe changes on this base model, and what stands there with these changes."""
    section = "ablations" if MARK in method else "methods"
    own: Mapping[str, Any] = getattr(params, section).get(method, {}).get(params.base_model, {})
    return section, {**own, **changes}


def without_weights(root: Path) -> None:
    """Give back the disk that a recipe's trainings took; what was measured stays (`measuring`)."""
    for name in RESULTS:
        shutil.rmtree(root / "data" / name, ignore_errors=True)


def _link(link: Path, target: Path) -> None:
    """A relative one, so that a workspace may be moved."""
    if target.is_dir() and not link.is_dir():
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()), target_is_directory=True)


def _copy(source: Path, target: Path) -> None:
    """Of a concept's folder, which another program may change meanwhile."""
    if target.is_dir():
        if concept_files.content(source) == concept_files.content(target):
            return
        shutil.rmtree(target)
    with folder_aside(target) as aside:
        whole = aside / target.name
        shutil.copytree(source, whole)
        whole.rename(target)
