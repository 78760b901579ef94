"""The images that DreamBench++'s code makes of its concepts.

The layout is that of https://github.com/yuangpeng/dreambench_plus (dreambench_plus/generate_images.py):
`METHOD/tgt_image/CONCEPT/PROMPT_IMAGE.jpg`, and the prompt in `METHOD/text/CONCEPT/PROMPT_IMAGE.txt`. One generator
makes all images of a method, so none of them has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.external.folders import folder_names, image_names, only_or_chosen
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import is_folder, is_there, read_text

NAME = "dreambench++"
MEANING = "DreamBench++: `METHOD/tgt_image/CONCEPT/PROMPT_IMAGE.jpg`, and the prompts in `METHOD/text/CONCEPT/`"
OPTIONS: Mapping[str, str] = {
    "method": "the method's folder, where there are several",
    "concept": "the concept's folder, such as `live_subject_animal_00_kitten`, where there are several",
}

IMAGES, TEXTS = "tgt_image", "text"


def recognises(folder: Path) -> bool:
    return bool(_methods(folder))


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    methods = _methods(folder)
    if not methods:
        raise InputError(f"{folder} holds no {IMAGES} and {TEXTS}, nor a method's folder that holds them")
    method = folder / only_or_chosen(options, "method", methods, folder)
    concepts = folder_names(method / IMAGES)
    if not concepts:
        raise InputError(f"{method / IMAGES} holds no concept's folder")
    concept = only_or_chosen(options, "concept", concepts, method / IMAGES)
    images, left_out = [], []
    for name in image_names(method / IMAGES / concept):
        file = (method / IMAGES / concept / name).relative_to(folder).as_posix()
        text = method / TEXTS / concept / f"{Path(name).stem}.txt"
        if is_there(text):
            images.append(external_image(file, read_text(text), None, str(text)))
        else:
            left_out.append((file, f"has no prompt: {text} is not there"))
    return Listing(tuple(images), NAME, tuple(left_out))


def _methods(folder: Path) -> list[str]:
    """The folders of methods in a folder; itself, if it is one."""
    return [
        name
        for name in [".", *folder_names(folder)]
        if is_folder(folder / name / IMAGES) and is_folder(folder / name / TEXTS)
    ]
