"""Scores to a comparison: everything that this workspace has scored, in one table, with grids and plots."""

from __future__ import annotations

import time
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.files import MANIFEST, is_current, read_json, sources_hash, stamp_of, whole_folder
from personalize_core.methods import ABLATION_NAMES
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.stamps import COMPARING
from personalize_core.store import REFERENCES, Store


def compare(store: Store, listener: Listener = unheard) -> Report:
    """All that has been scored in this workspace: one table, one summary, pictures and plots.

    A concept and method of params.yaml without scores is left out, and listed in summary.json as missing. Ablations
    need not stand in params.yaml: each that was drawn by this base model and scored joins.

    Raises:
        InputError: nothing has been scored, or the tables were made by different encoders.
    """
    from personalize_core import comparison

    started, folder = time.monotonic(), store.comparison()
    cells = [
        (method, concept)
        for concept in store.concept_names()
        for method in (*store.params.method_names, *_further_ablations(store, concept), REFERENCES)
    ]
    there = [cell for cell in cells if (store.scores(*cell) / MANIFEST).is_file()]
    if all(method == REFERENCES for method, _ in there):
        raise InputError(f"nothing has been scored in {store.data}; `personalize run` makes whatever is missing")
    stamp = stamp_of(
        {
            "tables": [read_json(store.scores(*cell) / MANIFEST)["stamp"] for cell in there],
            "cells": cells,
            "sources": sources_hash(COMPARING),
        }
    )
    with store.alone("comparison"):
        skipped = is_current(folder, stamp)
        if not skipped:
            listener(Event("comparing", 0, 1))
            with whole_folder(folder, stamp) as new:
                comparison.write(store, there, [cell for cell in cells if cell not in there], new)
            listener(Event("comparing", 1, 1))
    pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
    return Report(stamp, skipped, time.monotonic() - started, folder, {}, pictures)


def _further_ablations(store: Store, concept: str) -> list[str]:
    """Ablations that params.yaml does not name, with scores of pictures by this base model."""
    found = [name for name in ABLATION_NAMES if name not in store.params.method_names]
    scored = [name for name in found if (store.scores(name, concept) / MANIFEST).is_file()]
    return [name for name in scored if _drawn_by(store.grid(name, concept)) == store.params.base_model]


def _drawn_by(grid: Path) -> str | None:
    """The name of the base model; None if there is no grid."""
    try:
        return read_json(grid / "grid.json")["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
