"""The samples that kohya's sd-scripts write while they train, and the file of their prompts.

The layout is that of https://github.com/kohya-ss/sd-scripts (library/train_util.py, sample_image_inference and
load_prompts): `sample/NAME_STEP_INDEX_TIME_SEED.png`, STEP being `000500` or, at the end of an epoch, `e000010`. The
seed stands there if the prompt's line sets one (`--d`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, said_by, shown
from personalize_core.external.folders import (
    MOST_LIST,
    chosen,
    image_names,
    inner_folder,
    named_or_found,
    object_in,
    only_or_chosen,
)
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import read_json, read_text

NAME = "kohya"
MEANING = "kohya's sd-scripts: `sample/NAME_STEP_INDEX_TIME_SEED.png`, and the file of their `--sample_prompts`"
OPTIONS: Mapping[str, str] = {
    "step": "the step, such as `000500`, or the epoch, such as `e000010`; the last one, if it is not given",
    "method": "the training's `--output_name`, where there are several",
    "prompts": "the file of `--sample_prompts` (text, TOML or JSON), if it is not `sample/prompt.txt`",
}

SAMPLES, PROMPTS = "sample", "prompt.txt"
_RUN, _SEED = r"(?:(?P<run>.+)_)?", r"(?:_(?P<seed>\d{1,20}))?"
_PLACE, _TIME = r"(?P<step>e?\d{6})_(?P<index>\d{2,6})", r"(?P<time>\d{14})"
_NAMES = [re.compile(f"{_RUN}{of}{_SEED}") for of in (f"{_PLACE}_{_TIME}", f"{_TIME}_{_PLACE}")]
"""The time stood before the step in older versions."""


def recognises(folder: Path) -> bool:
    names = image_names(inner_folder(folder, SAMPLES))
    return bool(names) and all(map(_match, names))


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    images_in = inner_folder(folder, SAMPLES)
    found = {name: match for name in image_names(images_in) if (match := _match(name))}
    if not found:
        raise InputError(f"{images_in} holds no image named NAME_STEP_INDEX_TIME, as sd-scripts name them")
    run = only_or_chosen(options, "method", sorted({match["run"] or "" for match in found.values()}), images_in)
    found = {name: match for name, match in found.items() if (match["run"] or "") == run}
    in_order = sorted(found, key=lambda name: found[name]["time"])
    step = chosen(options, "step", sorted({match["step"] for match in found.values()}), images_in)
    step = step or found[in_order[-1]]["step"]
    path = named_or_found(folder, options, "prompts", [PROMPTS, f"{SAMPLES}/{PROMPTS}"])
    if path is None:
        raise InputError(f"{folder} has no {PROMPTS}; name the file of --sample_prompts by the option prompts")
    prompts = _prompts_of(path)
    inner = images_in.relative_to(folder)
    latest: dict[int, str] = {}
    left_out = []
    for name in in_order:
        if found[name]["step"] == step:
            index = int(found[name]["index"])
            if index in latest:
                left_out.append(((inner / latest[index]).as_posix(), "was made once more later"))
            latest[index] = name
    images = []
    for index, name in sorted(latest.items()):
        if index >= len(prompts):
            raise InputError(
                f"{images_in}: {shown(name)} is of prompt {index}, and {path} holds {len(prompts)}, from 0"
            )
        seed = found[name]["seed"]
        images.append(
            external_image((inner / name).as_posix(), prompts[index], None if seed is None else int(seed), str(path))
        )
    return Listing(tuple(images), NAME, tuple(left_out))


def _match(name: str) -> re.Match[str] | None:
    """The parts of an image's name."""
    return next((found for form in _NAMES if (found := form.fullmatch(Path(name).stem))), None)


def _prompts_of(path: Path) -> list[str]:
    """The prompts, in the order of the images' indices."""
    match path.suffix.lower():
        case ".json":
            written: Any = read_json(path, MOST_LIST)
        case ".toml":
            written = _from_toml(path)
        case _:
            lines = read_text(path, MOST_LIST).splitlines()
            written = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not isinstance(written, list) or not written:
        raise InputError(f"{path} holds no prompt")
    prompts = []
    for index, entry in enumerate(written):
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise InputError(f"{path}: prompt {index} should be a text, and is {shown(entry)}")
        prompts.append(prompt.split(" --")[0] if isinstance(entry, str) else prompt)
    return prompts


def _from_toml(path: Path) -> list[dict[str, Any]]:
    try:
        found = tomllib.loads(read_text(path, MOST_LIST))
    except (ValueError, RecursionError) as error:  # a number of too many digits is no TOMLDecodeError
        raise InputError(f"{path} is not TOML: {said_by(error)}") from None
    common = object_in(found, "prompt")
    subsets = common.get("subset")
    return [{**common, **subset} for subset in subsets or [] if isinstance(subset, dict)]
