"""The images of one method and concept that this project sampled in another workspace, on another base model say.

The layout is that of sampling/grid.py: `VARIANT/PROMPT_IMAGE.png`, and `grid.json`, which says the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, listed, shown
from personalize_core.external.folders import MOST_LIST, image_names, only_or_chosen
from personalize_core.external.listing import MOST_IMAGES, Listing, external_image, inner_path
from personalize_core.files.outside import is_folder, is_there, read_json_object

NAME = "personalize"
MEANING = "another workspace of this project: `data/grids/METHOD/CONCEPT`, with its `grid.json`"
OPTIONS: Mapping[str, str] = {"variant": "the sampling variant, where there are several"}

DESCRIPTION = "grid.json"


def recognises(folder: Path) -> bool:
    return is_there(folder / DESCRIPTION)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    path = folder / DESCRIPTION
    described = read_json_object(path, MOST_LIST)
    variants, templates = (_texts(described, key, path) for key in ("variants", "templates"))
    known = [name for name in variants if inner_path(f"{name}/0.png", str(path)) and is_folder(folder / name)]
    if not known:
        raise InputError(f"{folder} holds no folder of images of {listed(variants, 12)}, which {DESCRIPTION} names")
    variant = only_or_chosen(options, "variant", known, folder)
    there = set(image_names(folder / variant))
    per_prompt: Any = described.get("images_per_prompt")
    whole = isinstance(per_prompt, int) and not isinstance(per_prompt, bool)
    if not whole or not 0 < per_prompt * len(templates) <= MOST_IMAGES:
        raise InputError(f"{path}: images_per_prompt is {shown(per_prompt)}, and should be a number of images")
    names = {
        f"{prompt:02d}_{image:02d}.png": template
        for prompt, template in enumerate(templates)
        for image in range(per_prompt)
    }
    images = [
        external_image(f"{variant}/{name}", template, None, f"{path}, {name}")
        for name, template in names.items()
        if name in there
    ]
    left_out = [(f"{variant}/{name}", "is not there") for name in names if name not in there]
    base_model = described.get("base_model")
    return Listing(tuple(images), NAME, tuple(left_out), base_model if isinstance(base_model, str) else None)


def _texts(described: Mapping[str, Any], key: str, path: Path) -> list[str]:
    """Raises InputError where there is no list of texts under this key."""
    found = described.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise InputError(f"{path}: {key} is {shown(found)}, and should be a list of texts")
    return found
