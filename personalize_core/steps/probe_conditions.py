"""What a training must have, to end or to choose by what is seen of it; known without any model."""

from __future__ import annotations

from pathlib import Path

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.methods import method_of
from personalize_core.workspace.recipes import split_of
from personalize_core.workspace.store import Store


def check_held_out(store: Store, concept: str, method: str) -> None:
    """Raise InputError where the method is to choose by images held out of this concept, and none is."""
    adaptive = store.params.config(method).adaptive
    if adaptive and adaptive.needs_probes and adaptive.by != "text" and not held_out_of(store, concept):
        raise InputError(
            f"{method}: adaptive chooses by images that are held out, so that a copy does not win, and of {concept!r} "
            "none is: set held_out in params.yaml, and give the concept six images or more; or choose `by: text`, or "
            f"`stop: loss` with `keep: last`; {options_of(store, method)}"
        )


def options_of(store: Store, method: str) -> str:
    """Where a person writes what decides when this method's training ends."""
    section = "methods" if method == method_of(method) else "ablations"
    return f"its options stand in params.yaml, {section}.{method}.{store.params.base_model}.adaptive"


def held_out_of(store: Store, concept: str) -> list[Path]:
    """The concept images that are held out; none where none was asked for."""
    if not store.params.held_out:
        return []
    names = split_of(store, concept).held_out
    return [path for path in concept_files.concept_images(store.concept_folder(concept)) if path.name in names]
