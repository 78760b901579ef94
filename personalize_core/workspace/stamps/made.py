"""The stamps of results that are there, once they are found whole and unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from personalize_core.artifacts.description import check as check_description
from personalize_core.artifacts.description import imported
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import MANIFEST, changed_files, read_json
from personalize_core.workspace import commands
from personalize_core.workspace.stamps.common import base_model
from personalize_core.workspace.store import Store, is_label

if TYPE_CHECKING:
    from pathlib import Path


def artifact_stamp(store: Store, concept: str, method: str) -> str:
    """Of the method's artifact, if it is one of this base model.

    Raises:
        InputError: there is no such concept, no such artifact, or it is damaged or of another base model.
    """
    folder = store.artifact(method, concept)
    if imported(folder):
        check_artifact(store, concept, method)
        return manifest_stamp(folder, f"{folder} has no manifest", f"remove {folder} and import it again")
    if not folder.exists():
        store.concept(concept)  # so that a misspelt name is said to be one
    again = f"run `{commands.artifact(store, concept, method)}`"
    stamp = manifest_stamp(folder, f"{method} has not been trained on {concept!r}", again)
    check_artifact(store, concept, method)
    return stamp


def check_artifact(store: Store, concept: str, method: str) -> None:
    """Raise InputError unless the folder holds an artifact of this method and base model."""
    about = base_model(store)
    check_description(store.artifact(method, concept), method, about.name, about.weights_hash)


def grid_stamp(store: Store, concept: str, method: str) -> str:
    """Of the method's grid of images; method may be the label of an external column, whose list of images it is then.

    Raises:
        InputError: as `manifest_stamp`.
    """
    missing = f"{method} has sampled no grid of {concept!r}"
    if is_label(method):
        missing = f"the images of {method!r} of {concept!r} have not been scored"
    return manifest_stamp(store.grid(method, concept), missing, f"run `{commands.grid(store, concept, method)}`")


def score_table_stamp(store: Store, concept: str, method: str) -> str:
    """Of the table of scores that is there; method may be the label of an external column, or REFERENCES.

    Raises:
        InputError: as `manifest_stamp`.
    """
    missing = f"the images of {method!r} of {concept!r} have not been scored"
    return manifest_stamp(store.scores(method, concept), missing, f"run `{commands.scores(store, concept, method)}`")


def manifest_stamp(folder: Path, what_is_missing: str, again: str) -> str:
    """The stamp of a result that is there, whole and unchanged.

    again: what a user can do to have it there, for the messages.

    Raises:
        InputError: it is not there, its manifest is damaged, or one of its files has been changed or removed since.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        stamp, changed = manifest["stamp"], changed_files(folder, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{what_is_missing}; {again}") from None
    if changed:
        raise InputError(f"{folder}: {listed(changed)} changed since this was made, or is gone; {again}")
    return stamp
