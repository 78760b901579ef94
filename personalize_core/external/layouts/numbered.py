"""Images that are named after their prompt's number and their seed, and a list of the prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from personalize_core.errors import InputError, shown
from personalize_core.external.folders import all_named, image_names, named_or_found, prompts_of
from personalize_core.external.listing import Listing, external_image

NAME = "numbered"
PROMPTS = "prompts.txt"
MEANING = f"`PROMPTINDEX_SEED.png`, and `{PROMPTS}` with one prompt a line; the first prompt has the index 0"
OPTIONS: Mapping[str, str] = {"prompts": f"a text file with one prompt a line, in place of `{PROMPTS}` in the folder"}

_NAMED = re.compile(r"(\d{1,6})_(\d{1,20})")


def recognises(folder: Path) -> bool:
    return all_named(folder, _NAMED)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    path = named_or_found(folder, options, "prompts", [PROMPTS])
    if path is None:
        raise InputError(
            f"{folder} has no {PROMPTS}; put it there with one prompt a line, or name one by the option prompts"
        )
    prompts = prompts_of(path)
    images, left_out = [], []
    for name in image_names(folder):
        found = _NAMED.fullmatch(Path(name).stem)
        if not found:
            left_out.append((name, "is not named PROMPTINDEX_SEED"))
            continue
        index = int(found[1])
        if index >= len(prompts):
            raise InputError(
                f"{folder}: {shown(name)} is of prompt {index}, and {path} holds {len(prompts)}, numbered from 0"
            )
        images.append(external_image(name, prompts[index], int(found[2]), str(folder / name)))
    return Listing(tuple(images), NAME, tuple(left_out))
