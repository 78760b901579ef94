"""The validation images that diffusers' training scripts save with the model card.

The layout is that of `save_model_card` in https://github.com/huggingface/diffusers/tree/main/examples: `image_0.png`,
`image_1.png`, ... beside `README.md`, whose front matter says the base model and, in most scripts, the validation
prompt. One generator makes all images of a validation, so none of them has a seed of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError
from personalize_core.external.folders import images_named, named_or_found, object_in, prompts_of
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import is_there, parse_yaml, read_text

NAME = "diffusers"
MEANING = "diffusers' training scripts: `image_INDEX.png` beside the model card `README.md`"
OPTIONS: Mapping[str, str] = {
    "prompts": "a text file with the validation prompt, or with one prompt an image, if the model card does not say it"
}

CARD = "README.md"
_NAMED = re.compile(r"image_(\d{1,6})")
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---", re.S)


def recognises(folder: Path) -> bool:
    return is_there(folder / CARD) and is_there(folder / "image_0.png")


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    found = {name: int(match[1]) for name, match in images_named(folder, _NAMED).items()}
    names = sorted(found, key=lambda name: found[name])
    if not names:
        raise InputError(f"{folder} holds no image named image_INDEX, as diffusers' training scripts name them")
    card = _card_of(folder)
    model = card.get("base_model")
    path = named_or_found(folder, options, "prompts", [])
    prompts = _from_card(card) if path is None else dict(zip(names, _for_each(names, path), strict=True))
    if lacking := [name for name in names if not prompts.get(name, "").strip()]:
        raise InputError(
            f"{folder / CARD} does not say the prompt of {lacking[0]}; name a text file with it by the option prompts"
        )
    images = [external_image(name, prompts[name], None, str(folder / CARD)) for name in names]
    return Listing(tuple(images), NAME, base_model=model if isinstance(model, str) else None)


def _for_each(names: list[str], path: Path) -> list[str]:
    prompts = prompts_of(path)
    if len(prompts) not in (1, len(names)):
        raise InputError(f"{path} holds {len(prompts)} prompts for {len(names)} images; write one, or one an image")
    return prompts if len(prompts) == len(names) else prompts * len(names)


def _card_of(folder: Path) -> dict[str, Any]:
    """The front matter of the model card."""
    if not is_there(folder / CARD):
        return {}
    found = _FRONT_MATTER.match(read_text(folder / CARD))
    return object_in(parse_yaml(found[1], folder / CARD)) if found else {}


def _from_card(card: Mapping[str, Any]) -> dict[str, str]:
    """The prompt of each image by its name."""
    widget = card.get("widget")
    entries = [object_in(entry) for entry in widget] if isinstance(widget, list) else []
    return {str(object_in(entry, "output").get("url")): str(entry.get("text") or "") for entry in entries}
