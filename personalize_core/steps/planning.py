"""What is not up to date, and why: found by the stamps that the steps themselves go by, without doing anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, listed
from personalize_core.files import MANIFEST, Stamp, is_current, read_json, spelled_out
from personalize_core.steps.checks import check_photographs
from personalize_core.steps.class_images import class_images_are_there
from personalize_core.steps.drawing import grid_stamp
from personalize_core.steps.recipes import (
    asking_for_class_images,
    concepts_wanted,
    preprocessing_of,
    prompts_of,
    recipe_of,
)
from personalize_core.steps.scores import score_stamp
from personalize_core.steps.stamps import check_artifact, latents_stamp, train_stamp
from personalize_core.steps.training import imported
from personalize_core.store import REFERENCES, Store

TRAIN, DRAW, SCORE = "train", "draw", "score"
CANNOT = "cannot"

# What stands in a stamp, in the words of people; of a path's parts, the first that is here counts.
IN_WORDS = {
    "sources": "code",
    "refining_sources": "code",
    "base_model": "base model",
    "vae": "base model",
    "image_size": "base model",
    "class_images": "class images",
    "files": "photographs",
    "photographs": "photographs",
    "config": "recipe",
    "preprocessing": "recipe",
    "concept": "description",
    "templates": "prompts",
    "variants": "sampling options",
    "refinement": "sampling options",
    "lists": "encoders",
    "without_identity": "prompts",
    "artifact": "artifact",
    "grid": "pictures",
}


@dataclass(frozen=True)
class Cell:
    """A concept and method whose results are not up to date."""

    concept: str
    method: str
    first: str  # the first step that has something to do, the later ones follow: train, draw, score; or it cannot
    why: str

    @property
    def possible(self) -> bool:
        return self.first != CANNOT


def plan(store: Store, concepts: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> list[Cell]:
    """Every concept and method that is not up to date, in the order of concepts and of params.yaml.

    By default all concepts of the workspace (or of the protocol), and the methods and ablations that params.yaml lists.
    What could not be trained is among them, with the sentence that the step would end with.
    """
    concepts = concepts_wanted(store) if concepts is None else concepts
    methods = store.params.method_names if methods is None else methods
    cells = [_look_at(store, concept, method) for concept in concepts for method in methods]
    return [cell for cell in cells if cell]


def is_prepared(store: Store, concept: str) -> bool:
    """Is all there that the methods of params.yaml share: latents, class images, the scores of the photographs?

    Raises:
        InputError: the concept is not usable.
    """
    recipes = {recipe.key: recipe for recipe in (preprocessing_of(store, name) for name in store.params.method_names)}
    noun = store.concept(concept).class_noun
    return (
        all(is_current(store.latents(concept, key), latents_stamp(store, concept, r)) for key, r in recipes.items())
        and all(class_images_are_there(store, noun, method) for method in asking_for_class_images(store))
        and is_current(store.scores(REFERENCES, concept), score_stamp(store, concept, REFERENCES))
    )


def _look_at(store: Store, concept: str, method: str) -> Cell | None:
    from personalize_core.data import image_files

    try:
        recipe_of(store, method)
        prompts_of(store, concept)
        check_photographs(store, concept, len(image_files(store.concept_folder(concept))), method)
        artifact = store.artifact(method, concept)
        if imported(artifact):
            check_artifact(store, concept, method)
        elif why := _stale(artifact, train_stamp(store, concept, method), "has not been trained"):
            return Cell(concept, method, TRAIN, why)
        if why := _stale(store.grid(method, concept), grid_stamp(store, concept, method), "has not been drawn"):
            return Cell(concept, method, DRAW, why)
        if why := _stale(store.scores(method, concept), score_stamp(store, concept, method), "has not been scored"):
            return Cell(concept, method, SCORE, why)
    except InputError as error:
        return Cell(concept, method, CANNOT, str(error))
    return None


def _stale(folder: Path, stamp: Stamp, missing: str) -> str | None:
    """Why a step would make this folder anew; None: it would not."""
    if is_current(folder, stamp):
        return None
    if not folder.exists():
        return missing
    try:
        manifest = read_json(folder / MANIFEST)
        before = manifest["stamp"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or damaged"
    if before == stamp:
        return "some of its files are missing or cut off"
    if "made_from" not in manifest:
        return "changed since; an earlier version of this program made it, which kept no list of what it depends on"
    return "; ".join(_in_words(manifest["made_from"], spelled_out(stamp.of)))


def _in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, each kind of thing once, with names and values where a person may know them."""
    found: dict[str, dict[str, None]] = {}
    for path, old, new in _differences(before, now):
        part = next((part for part in path if part in IN_WORDS), path[0])
        found.setdefault(IN_WORDS.get(part, part), {}).update(dict.fromkeys(_details(part, path, old, new)))
    return [f"{what} changed" + (f": {listed(details)}" if details else "") for what, details in found.items()]


def _details(part: str, path: tuple[str, ...], old: Any, new: Any) -> list[str]:
    last = path[-1]
    if part in ("sources", "refining_sources"):
        return [last if "." in last else f"{last}.py"]
    if part in ("files", "photographs"):
        verb = "added " if old is None else "removed " if new is None else ""
        return [f"{verb}{last}"]
    if part == "config" and isinstance(old, str) and isinstance(new, str):
        fields = [dict(re.findall(r"(\w+)=(.*?)(?=, \w+=|\)$)", text)) for text in (old, new)]
        return [f"{name} {fields[0].get(name, 'not there')} -> {value}" for name, value in fields[1].items()
                if fields[0].get(name) != value]  # fmt: skip
    if part in ("sampling", "seed", "precision", "gradient_checkpointing", "concept"):
        return [f"{last if last != part else ''} {old} -> {new}".strip()]
    return []


def _differences(before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, old and new value of every leaf that differs; a stamp that says what it is of is itself not looked at."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if "of" in before and "of" in now:
            yield from _differences(before["of"], now["of"], path)
            return
        for name in [*before, *(name for name in now if name not in before)]:
            yield from _differences(before.get(name), now.get(name), (*path, str(name)))
    elif before != now:
        yield path, before, now
