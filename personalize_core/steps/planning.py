"""What is not up to date, and why: found by the stamps that the steps themselves go by, without doing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from personalize_core.artifacts.description import imported
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import changed_files, has_this_format, is_up_to_date
from personalize_core.files.snapshot import memoized, snapshot
from personalize_core.files.stamps import Stamp
from personalize_core.steps.class_images import class_images_are_there
from personalize_core.steps.input_checks import check_concept_images
from personalize_core.workspace.lineage.differences import why_stale
from personalize_core.workspace.lineage.records import DAMAGED, manifest_of
from personalize_core.workspace.recipes import (
    asking_for_class_images,
    concepts_wanted,
    preparations,
    prompts_of,
    recipe_of,
    split_of,
    variants_of,
)
from personalize_core.workspace.stamps.latents import latents_stamp
from personalize_core.workspace.stamps.made import check_artifact
from personalize_core.workspace.stamps.sampling import sampling_inputs
from personalize_core.workspace.stamps.scoring import score_stamp
from personalize_core.workspace.stamps.training import train_stamp
from personalize_core.workspace.store import REFERENCES, Store

TRAIN, SAMPLE, SCORE = "train", "sample", "score"
CANNOT = "cannot"


@dataclass(frozen=True)
class Cell:
    """A concept and method whose results are not up to date."""

    concept: str
    method: str
    first: str  # the first step that has something to do, the later ones follow: train, sample, score; or it cannot
    why: str
    earlier: bool = False  # what is there was made by an earlier version of this program

    @property
    def possible(self) -> bool:
        return self.first != CANNOT

    def impossible(self, why: str) -> Cell:
        """The same cell, with a reason why nothing can be done about it now."""
        return replace(self, first=CANNOT, why=why)


@snapshot()
def plan(store: Store, concepts: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> list[Cell]:
    """Every concept and method that is not up to date, in the order of concepts and of params.yaml.

    By default all concepts of the workspace (or of the protocol), and the methods and ablations that params.yaml lists.
    What could not be trained is among them, with the sentence that the step would end with.
    """
    concepts = concepts_wanted(store) if concepts is None else concepts
    methods = store.params.method_names if methods is None else methods
    cells = [_look_at(store, concept, method) for concept in concepts for method in methods]
    return [cell for cell in cells if cell]


def earlier_version_notice(cells: Sequence[Cell]) -> str | None:
    """What a person must know before results of an earlier version are replaced; None if a plan has none."""
    earlier = [cell for cell in cells if cell.earlier]
    if not earlier:
        return None
    trained = sum(cell.first == TRAIN for cell in earlier)
    return (
        f"{len(earlier)} of {len(cells)} results that are not up to date were made by an earlier version of this "
        f"program. This version names sources and settings differently, so it cannot reuse them: they are "
        f"made again ({trained} trained anew, {len(earlier) - trained} sampled or scored anew) and replaced. To keep "
        "them, copy or move data/ to another place first, or keep using the earlier version in this folder."
    )


@snapshot()
def is_prepared(store: Store, concept: str) -> bool:
    """Is all there that the methods of params.yaml share: latents, class images, the scores of the concept images?

    A method whose recipe is wrong wants nothing: its own cells say so, and those of other methods go on.

    Raises:
        InputError: the concept is not usable.
    """
    recipes = preparations(store)
    noun = store.concept(concept).class_noun
    return (
        all(is_up_to_date(store.latents(concept, key), latents_stamp(store, concept, r)) for key, r in recipes.items())
        and all(class_images_are_there(store, noun, name) for name in asking_for_class_images(store))
        and is_up_to_date(store.scores(REFERENCES, concept), score_stamp(store, concept, REFERENCES))
    )


@memoized
def _decode(folder: Path) -> None:
    """Raise InputError if a concept image cannot be read."""
    concept_files.concept_images(folder)


def _look_at(store: Store, concept: str, method: str) -> Cell | None:
    try:
        recipe_of(store, method)
        prompts_of(store, concept)
        trained_on = len(split_of(store, concept).trained_on)
        check_concept_images(store, concept, trained_on, method, variants_of(store, method))
        artifact = store.artifact(method, concept)
        if imported(artifact):
            check_artifact(store, concept, method)
        elif why := _stale(artifact, train_stamp(store, concept, method), "has not been trained"):
            _decode(store.concept_folder(concept))  # only now: of what is up to date, that would be most of the work
            return Cell(concept, method, TRAIN, why, _is_of_earlier_version(artifact))
        grid, scores = store.grid(method, concept), store.scores(method, concept)
        if why := _stale(grid, sampling_inputs(store, concept, method).stamp, "has not been sampled"):
            return Cell(concept, method, SAMPLE, why, _is_of_earlier_version(grid))
        if why := _stale(scores, score_stamp(store, concept, method), "has not been scored"):
            return Cell(concept, method, SCORE, why, _is_of_earlier_version(scores))
    except InputError as error:
        return Cell(concept, method, CANNOT, str(error))
    return None


def _stale(folder: Path, stamp: Stamp, missing: str) -> str | None:
    """Why a step would make this folder anew; None: it would not."""
    if is_up_to_date(folder, stamp):
        return None
    if not folder.exists():
        return missing
    if not (manifest := manifest_of(folder)):
        return DAMAGED
    if why := why_stale(manifest, stamp):
        return why
    return f"changed since it was made, or gone: {listed(changed_files(folder, manifest['files']))}"


def _is_of_earlier_version(folder: Path) -> bool:
    return bool(manifest_of(folder)) and not has_this_format(folder)
