"""Scores to a comparison: everything that this workspace has scored, in one table, with grids and plots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, has_this_format, is_up_to_date, read_record
from personalize_core.files.stamps import sources_hash, stamp_of
from personalize_core.methods import ABLATION_NAMES
from personalize_core.sampling.grid import DESCRIPTION
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.repeating import find_trainings, scores_of
from personalize_core.steps.sampling import sampled_as_now
from personalize_core.workspace.external_columns import registered
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import concepts_wanted
from personalize_core.workspace.stamps.made import score_table_stamp
from personalize_core.workspace.stamps.sources import COMPARING
from personalize_core.workspace.store import REFERENCES, Store, is_label

if TYPE_CHECKING:
    from personalize_core.metrics.costs import Places


def compare(store: Store, listener: Listener = unheard) -> Report:
    """All that has been scored by this protocol, or as params.yaml says: one table, one summary, images and plots.

    A concept and method of the experiment without scores is left out, and listed in summary.json as missing; so is
    one whose images were sampled otherwise than the protocol or params.yaml says now. Ablations of the methods'
    recipes need not stand in params.yaml: each that was sampled from this base model and scored joins in. Where a
    method was trained again with other seeds, the noise of its training goes into its verdicts.

    Raises:
        InputError: nothing has been scored, or the tables were made by different encoders.
    """
    from personalize_core.metrics import costs
    from personalize_core.report import display_names

    started, folder = time.monotonic(), store.comparison()
    cells = [
        (method, concept)
        for concept in _concepts(store)
        for method in (*store.params.method_names, *_further_ablations(store, concept), REFERENCES)
    ]
    wanted = {concept for _, concept in cells}
    cells += [(label, concept) for label, concept in registered(store) if concept in wanted]
    scored = [cell for cell in cells if has_this_format(store.scores(*cell))]
    otherwise = [cell for cell in scored if cell[0] != REFERENCES and not _as_now(store, *cell)]
    there = [cell for cell in scored if cell not in otherwise]
    if all(method == REFERENCES for method, _ in there):
        by = f"protocol {store.protocol!r}" if store.protocol else "params.yaml"
        nothing = f"nothing has been scored in {store.sampled} by this version of the program"
        if otherwise:
            nothing = f"all that has been scored in {store.sampled} was sampled otherwise than {by} says now"
        raise InputError(f"{nothing}; `personalize run` makes whatever is missing")
    trainings, left_out = find_trainings(store, [cell for cell in there if cell[0] != REFERENCES])
    stamp = stamp_of(
        {
            "trainings": [
                score_table_stamp(again, concept, each.method)
                for each in trainings
                for concept in each.concepts
                for again in each.stores.values()
            ],
            "trainings_left_out": left_out,
            "tables": [score_table_stamp(store, concept, method) for method, concept in there],
            "cells": cells,
            "protocol": store.protocol,
            "baseline": store.params.baseline,
            "names": display_names.of(method for method, _ in cells),
            "sources": sources_hash(COMPARING),
        }
    )
    with store.alone("comparison"):
        skipped = is_up_to_date(folder, stamp)
        if not skipped:
            from personalize_core.report import comparison

            listener(Event("comparing", 0, 1))
            with making(store, folder, stamp) as new:
                missing = [cell for cell in cells if cell not in there]
                comparison.write(store, there, missing, new, [scores_of(each) for each in trainings], left_out)
            listener(Event("comparing", 1, 1))
    costs.write([_places(store, *cell) for cell in there if cell[0] != REFERENCES], store.costs())
    images = {path.stem: path for path in sorted(folder.glob("*.png"))}
    return Report(stamp, skipped, time.monotonic() - started, folder, {}, images)


def _as_now(store: Store, method: str, concept: str) -> bool:
    """An external column was not sampled here: it stands there as it was scored last."""
    return is_label(method) or sampled_as_now(store, method, concept)


def _places(store: Store, method: str, concept: str) -> Places:
    from personalize_core.metrics.costs import Places

    cell = (method, concept)
    measured = store.training_costs(*cell), store.sampling_costs(*cell)
    return Places(*cell, store.artifact(*cell), store.grid(*cell), *measured)


def _concepts(store: Store) -> list[str]:
    """Those of the protocol, and whichever others were scored by it."""
    wanted = concepts_wanted(store)
    scored = {path.parent.name for path in store.sampled.glob(f"metrics/*/*/{MANIFEST}")}
    return [*wanted, *sorted(scored.intersection(store.concept_names()) - set(wanted))]


def _further_ablations(store: Store, concept: str) -> list[str]:
    """Ablations of recipes that params.yaml does not name, with scores of images by this base model."""
    found = [name for name in ABLATION_NAMES if name not in store.params.method_names]
    scored = [name for name in found if (store.scores(name, concept) / MANIFEST).is_file()]
    return [name for name in scored if _sampled_by(store.grid(name, concept)) == store.params.base_model]


def _sampled_by(grid: Path) -> str | None:
    """The name of the base model; None if there is no grid."""
    return read_record(grid / DESCRIPTION).get("base_model")
