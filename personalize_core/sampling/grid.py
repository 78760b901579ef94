"""The folder of a grid: its images by name, and `grid.json`, which says what they were sampled from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json

DESCRIPTION = "grid.json"
IMAGE = re.compile(r"(?P<prompt>\d\d+)_(?P<image>\d\d+)\.png")  # as `image_name` has it
NEEDED = {"variants", "templates", "images_per_prompt", "base_model", "concept", "method"}


@dataclass(frozen=True)
class GridImage:
    """One image of a grid, in its place."""

    path: Path
    variant: str
    prompt: int  # its place in the grid's templates
    image: int  # which of this prompt
    seed: int | None = None  # of an image made elsewhere, where it is known


def image_name(variant: str, prompt: int, image: int) -> str:
    """Where an image lies in its grid's folder."""
    return f"{variant}/{prompt:02d}_{image:02d}.png"


def read_grid(folder: Path) -> dict[str, Any]:
    """What its images were sampled from.

    Raises:
        InputError: that is missing or damaged.
    """
    try:
        described = read_json(folder / DESCRIPTION)
    except (OSError, ValueError):
        described = None
    if not isinstance(described, dict) or not described.keys() >= NEEDED:
        raise InputError(
            f"{folder / DESCRIPTION}, which says what a grid's images were sampled from, is missing or damaged; "
            "`personalize evaluate` samples the grid again"
        )
    return described


def located(folder: Path, described: Mapping[str, Any], root: Path) -> list[GridImage]:
    """Every image of the grid in `folder`: of one sampled here, those that it should hold; else those that it lists.

    root: the workspace, which the folder of images made elsewhere may be named relative to.
    """
    if "external" in described:
        place = root / described["external"]["folder"]
        return [
            GridImage(place / one["file"], described["variants"][0], one["prompt"], one["image"], one["seed"])
            for one in described["images"]
        ]
    return [GridImage(folder / name, *place) for name, place in images_in(described).items()]


def images_in(described: Mapping[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Every image that the folder should hold, by its name there -> its variant, prompt and image."""
    return {
        image_name(variant, prompt, image): (variant, prompt, image)
        for variant in described["variants"]
        for prompt in range(len(described["templates"]))
        for image in range(described["images_per_prompt"])
    }
