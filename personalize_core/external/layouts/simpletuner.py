"""The validation images that SimpleTuner writes while it trains.

The layout is that of https://github.com/bghira/SimpleTuner (simpletuner/helpers/training/validation.py):
`validation_images/step_STEP_SHORTNAME_INDEX_WIDTHxHEIGHT.png`, without the index in older versions. The prompts are in
a JSON file, SHORTNAME to prompt, which it calls a user prompt library. Unless the benchmark of the base model is
disabled, SimpleTuner may put the base model's image left of the trained model's; such images are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, shown
from personalize_core.external.folders import (
    MOST_LIST,
    all_named,
    chosen,
    images_named,
    inner_folder,
    named_or_found,
    png_header,
)
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import read_json_object

NAME = "simpletuner"
MEANING = "SimpleTuner: `validation_images/step_STEP_SHORTNAME_INDEX_WIDTHxHEIGHT.png`, and the user prompt library"
OPTIONS: Mapping[str, str] = {
    "step": "the training step; the last one, if it is not given",
    "prompts": "the user prompt library or the training's `config.json`, if it does not lie in the folder",
}

SAMPLES, LIBRARY = "validation_images", "user_prompt_library.json"
_NAMED = re.compile(r"step_(?P<step>\d{1,9})_(?P<name>.+)_(?P<width>\d{1,5})(?:x(?P<height>\d{1,5}))?")
_NUMBERED = re.compile(r"(.+)_\d{1,6}")


def recognises(folder: Path) -> bool:
    return all_named(inner_folder(folder, SAMPLES), _NAMED)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    images_in = inner_folder(folder, SAMPLES)
    found = images_named(images_in, _NAMED)
    if not found:
        raise InputError(f"{images_in} holds no image named step_STEP_SHORTNAME_..., as SimpleTuner names them")
    steps = sorted({int(match["step"]) for match in found.values()})
    step = int(chosen(options, "step", list(map(str, steps)), images_in) or steps[-1])
    path = named_or_found(folder, options, "prompts", [LIBRARY, f"../{LIBRARY}"])
    if path is None:
        raise InputError(f"{folder} has no {LIBRARY}; name the file of the prompts by the option prompts")
    prompts = _prompts_of(path)
    inner = images_in.relative_to(folder)
    images, left_out = [], []
    for name, match in found.items():
        if int(match["step"]) != step:
            continue
        file = (inner / name).as_posix()
        prompt = _prompt_of(match["name"], prompts)
        if prompt is None:
            left_out.append((file, f"has no prompt in {path}"))
        elif not prompt.strip():
            left_out.append((file, "has an empty prompt"))
        elif (header := png_header(images_in / name)) and header[0][0] >= 2 * int(match["width"]):
            left_out.append((file, "holds several images side by side"))
        else:
            images.append(external_image(file, prompt, None, str(path)))
    return Listing(tuple(images), NAME, tuple(left_out))


def _prompt_of(name: str, prompts: Mapping[str, str]) -> str | None:
    numbered = _NUMBERED.fullmatch(name)
    return prompts.get(name, prompts.get(numbered[1]) if numbered else None)


def _prompts_of(path: Path) -> dict[str, str]:
    """SHORTNAME to prompt; of a training's configuration, its one validation prompt."""
    written = read_json_object(path, MOST_LIST)
    single = written.get("validation_prompt", written.get("--validation_prompt"))
    if isinstance(single, str):
        return {"validation": single, "unconditional": ""}
    prompts = {"unconditional": ""}
    for name, entry in written.items():
        prompt: Any = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise InputError(f"{path}: {shown(name)} should be a prompt, and is {shown(entry)}")
        prompts[name] = prompt
    return prompts
