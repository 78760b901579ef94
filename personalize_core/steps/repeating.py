"""The noise of training: the same method on the same concept, trained again with other seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from personalize_core.artifacts.description import imported
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, read_json
from personalize_core.methods import BASELINE
from personalize_core.sampling.grid import DESCRIPTION
from personalize_core.steps.sampling import sampled_as_now
from personalize_core.workspace.stamps.training import repeat_stamp
from personalize_core.workspace.store import SCORES, Store

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Trainings:
    """The trainings of one method that may be compared: number -> a workspace; 0 is the artifact itself."""

    method: str
    concepts: list[str]
    stores: Mapping[int, Store]


def check_repeatable(store: Store, concepts: Sequence[str], methods: Sequence[str]) -> None:
    """Raise InputError for what cannot be trained again: there would be no seed to change."""
    if BASELINE in methods:
        raise InputError(f"{BASELINE} learns nothing, so that training it again would change nothing; leave it out")
    for method in methods:
        for concept in concepts:
            if imported(store.artifact(method, concept)):
                raise InputError(
                    f"what {method} knows of {concept!r} was imported; how it was trained is not known here, so it "
                    "cannot be repeated; leave it out"
                )


def find_trainings(store: Store, cells: Sequence[tuple[str, str]]) -> tuple[list[Trainings], list[str]]:
    """The repeats of these (method, concept), whose own scores are there.

    A method's trainings are those that every concept has that was trained again at all. A repeat counts if it is of
    the very artifact that is there now, and was sampled as the artifact was.

    Returns:
        also those that do not count, as "METHOD/CONCEPT, training NUMBER".
    """
    metrics = sorted(int(path.name) for path in (store.data / "repeats").glob("*") if path.name.isdigit())
    counting: dict[str, dict[str, set[int]]] = {}
    left_out = []
    for method, concept in cells:
        for number in metrics:
            again = store.again(number)
            if not (again.scores(method, concept) / MANIFEST).is_file():
                continue
            if _is_repeat(store, again, method, concept):
                counting.setdefault(method, {}).setdefault(concept, set()).add(number)
            else:
                left_out.append(f"{method}/{concept}, training {number}")
    found = []
    for method, by_concept in counting.items():
        common = sorted(set.intersection(*by_concept.values()))
        if common:
            stores = {number: store.again(number) for number in (0, *common)}
            found.append(Trainings(method, sorted(by_concept), stores))
    return found, left_out


def scores_of(trainings: Trainings) -> dict[int, pl.DataFrame]:
    """Seed -> the scores of its concepts."""
    from personalize_core.metrics import tables

    return {
        again.training_seed: tables.concatenate(
            [tables.read(again.scores(trainings.method, concept) / SCORES) for concept in trainings.concepts]
        )
        for again in trainings.stores.values()
    }


def _is_repeat(store: Store, again: Store, method: str, concept: str) -> bool:
    """Do artifact, grid and scores of a repeat follow from one another, and from the artifact that is repeated?"""
    from personalize_core.metrics import tables

    try:
        original, own = (read_json(each.artifact(method, concept) / MANIFEST)["stamp"] for each in (store, again))
        grids = [read_json(each.grid(method, concept) / DESCRIPTION) for each in (store, again)]
        sampled = read_json(again.grid(method, concept) / MANIFEST)["files"]
        images = {entry["sha256"] for entry in sampled.values()}
        scored = tables.read(again.scores(method, concept) / SCORES)
        return (
            own == repeat_stamp(original, again.training_seed)
            and grids[1]["artifact"] == own
            and grids[1]["variants"] == grids[0]["variants"]
            and sampled_as_now(again, method, concept)
            and set(scored["image_sha256"]) <= images
        )
    except (OSError, ValueError, KeyError, TypeError):  # a part is missing or damaged; InputError is a ValueError
        return False
