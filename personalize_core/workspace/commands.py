"""The commands that make a result, or make it again: for messages, and for who asks how it came to be."""

from __future__ import annotations

import shlex

from personalize_core.artifacts.description import imported
from personalize_core.files.outside import is_there
from personalize_core.workspace.store import REFERENCES, Store, is_label


def personalize(store: Store, words: str) -> str:
    """By the protocol that the results are of, if they are of one."""
    return f"personalize {f'--protocol {store.protocol} ' if store.protocol else ''}{words}"


def artifact(store: Store, concept: str, method: str) -> str:
    """Of what was imported, the command names the file as it was called; where it lies now, nobody here knows."""
    if source := imported(store.artifact(method, concept)):
        return personalize(store, f"import {concept} {shlex.quote(source)} -m {method}")
    return _of_cell(store, concept, method, "train")


def grid(store: Store, concept: str, method: str) -> str:
    """method: or the label of an external column, the list of whose images it is then."""
    return _of_cell(store, concept, method, "evaluate")


def scores(store: Store, concept: str, method: str) -> str:
    """method: or the label of an external column, or REFERENCES."""
    if method == REFERENCES:
        return personalize(store, "step score-references")
    return _of_cell(store, concept, method, "evaluate")


def analyses(store: Store, concept: str, method: str) -> str:
    """method: or the label of an external column."""
    return personalize(store, f"analyse {concept} -m {method}")


def _of_cell(store: Store, concept: str, method: str, verb: str) -> str:
    if is_label(method):
        new = "" if is_there(store.external(method, concept)) else f" FOLDER --concept {concept} --as {method}"
        return personalize(store, f"score{new}")
    if store.repeat:
        return personalize(store, f"repeat {concept} -m {method} --times {store.repeat}")
    if verb == "evaluate" and not store.artifact(method, concept).exists():
        verb = "run"  # which trains it first
    return personalize(store, f"{verb} {concept} -m {method}")
