"""The images that CustomConcept101's evaluation takes.

The layout is that of https://github.com/adobe-research/custom-diffusion (customconcept101/README.md and evaluate.py):
`samples/` with the images, and `prompts.json`, which says the prompt of each image by its name without the ending.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.external.folders import folder_names, image_names, only_or_chosen, texts_in
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import is_folder, is_there

NAME = "customconcept101"
MEANING = "CustomConcept101: `samples/NAME.png`, and `prompts.json`, an object that says the prompt of each NAME"
OPTIONS: Mapping[str, str] = {"concept": "the folder that holds `samples` and `prompts.json`, where there are several"}

IMAGES, PROMPTS = "samples", "prompts.json"


def recognises(folder: Path) -> bool:
    return bool(_roots(folder))


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    roots = _roots(folder)
    if not roots:
        raise InputError(f"{folder} holds no {IMAGES} and {PROMPTS}, nor a folder that holds them")
    root = folder / only_or_chosen(options, "concept", roots, folder)
    path, inner = root / PROMPTS, (root / IMAGES).relative_to(folder)
    prompts = texts_in(path)
    there = {Path(name).stem: name for name in image_names(root / IMAGES)}
    images = [
        external_image((inner / there.get(stem, f"{stem}.png")).as_posix(), prompt, None, f"{path}, {stem}")
        for stem, prompt in prompts.items()
    ]
    left_out = [
        ((inner / name).as_posix(), f"is not named in {PROMPTS}") for stem, name in there.items() if stem not in prompts
    ]
    return Listing(tuple(images), NAME, tuple(left_out))


def _roots(folder: Path) -> list[str]:
    """The folders of samples in a folder; itself, if it is one."""
    return [
        name
        for name in [".", *folder_names(folder)]
        if is_folder(folder / name / IMAGES) and is_there(folder / name / PROMPTS)
    ]
