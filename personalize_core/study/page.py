"""The page of a study: one HTML file that needs no server and no network, and beside it the key that stays at home."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from personalize_core.errors import InputError
from personalize_core.files.atomic import whole_folder, write_bytes, write_json
from personalize_core.files.outside import is_there
from personalize_core.study.design import QUESTIONS, Key, Request, design, image_paths
from personalize_core.workspace.store import Store

PAGE, KEY = "study.html", "study_key.json"
IMAGE_SIZE = 1024  # longest side of an image in the page, in pixels
CONCEPT_IMAGE_SIZE = 512  # longest side of a concept image in the page, in pixels; it is shown at a third of that


Progress = Callable[[int, int], None]


def unseen(done: int, total: int) -> None:
    """For those who do not watch."""


@dataclass(frozen=True)
class Written:
    """Where the study lies, and how large it became."""

    page: Path
    key_file: Path
    key: Key
    megabytes: float


def write(store: Store, request: Request, to: Path, progress: Progress = unseen) -> Written:
    """Design a study and write its page and key into a new folder.

    progress: told of how many images are in the page already, and of how many.

    Raises:
        InputError: the folder exists, or the workspace does not hold what was asked for; nothing is written then.
    """
    if is_there(to):
        raise InputError(f"{to} exists already; name a folder that does not, so that no study is overwritten")
    key = design(store, request)
    page = render(store, key, progress)
    with whole_folder(to, key.study) as new:
        write_bytes(new / PAGE, page.encode())
        write_json(new / KEY, key.model_dump(mode="json"))
    return Written(to / PAGE, to / KEY, key, len(page) / 1e6)


def render(store: Store, key: Key, progress: Progress = unseen) -> str:
    """The whole page. What is in it names no variant, no concept and no file."""
    template = files("personalize_core.study").joinpath("page.html").read_text(encoding="utf-8")
    embedded = json.dumps(_embedded(store, key, progress), ensure_ascii=False)
    embedded = embedded.replace("<", "\\u003c")  # no end tag inside
    before, after = (part.replace("@@TITLE@@", html.escape(key.title)) for part in template.split("@@STUDY@@"))
    return before + embedded + after


def _embedded(store: Store, key: Key, progress: Progress) -> dict[str, Any]:
    from personalize_core.concepts.image_files import load_image

    images = []
    for path in image_paths(store, key):
        images.append(_sampled(load_image(path)))
        progress(len(images), len(key.images))
    return {
        "id": key.study,
        "each": key.each,
        "questions": [{"name": name} | vars(QUESTIONS[name]) for name in key.questions],
        "concepts": [
            {
                "noun": concept.class_noun,
                "concept_images": [
                    _concept_image(load_image(store.concept_folder(concept.name) / name))
                    for name in concept.concept_images
                ],
            }
            for concept in key.concepts
        ],
        "cells": [{"concept": cell.concept, "text": cell.text} for cell in key.cells],
        "comparisons": len(key.comparisons),
        "pairs": key.pairs(),
        "images": images,
    }


def _sampled(image: Image.Image) -> str:
    """Every pixel as it was sampled, unless there are very many, and nothing else that its file may have carried."""
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)  # which leaves smaller ones as they are
    return _data_uri(image, lossless=True, exact=True)


def _concept_image(image: Image.Image) -> str:
    image.thumbnail((CONCEPT_IMAGE_SIZE, CONCEPT_IMAGE_SIZE), Image.Resampling.LANCZOS)
    return _data_uri(image, quality=90)


def _data_uri(image: Image.Image, **how: Any) -> str:
    content = io.BytesIO()
    bare = Image.new("RGB", image.size)
    bare.paste(image)  # without the original's metadata
    bare.save(content, "WEBP", **how)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
