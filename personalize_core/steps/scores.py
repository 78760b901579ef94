"""Images to scores: a table with a row per image and metric."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import is_up_to_date, write_json
from personalize_core.methods import check_method
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.workspace.dependencies import score_stamp, without_identity
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import device_of, workers_of
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store, is_label

if TYPE_CHECKING:
    from personalize_core.metrics import features, scoring


def score(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Every image of a grid against its text and the concept's images, a row per image and metric.

    method: or the label of an external column whose images have been listed.
    """
    if not is_label(method):
        check_method(method)
    grid = store.grid(method, concept)

    def scored(
        concept_images: list[Path], encoders: features.Encoders, processing: features.Processing
    ) -> scoring.Scored:
        from personalize_core.metrics import scoring

        described, skipped = store.concept(concept), set(without_identity(store, concept, method))
        return scoring.score_grid(store.root, grid, described, concept_images, encoders, skipped, processing)

    with store.alone("grid", method, concept):  # whoever samples it anew: what is named is what is scored
        return _score(store, concept, method, scored, listener)


def score_references(store: Store, concept: str, listener: Listener = unheard) -> Report:
    """The concept's images against each other: what even real images reach."""

    def scored(
        concept_images: list[Path], encoders: features.Encoders, processing: features.Processing
    ) -> scoring.Scored:
        from personalize_core.metrics import scoring

        return scoring.score_references(store.root, store.concept(concept), concept_images, encoders)

    return _score(store, concept, REFERENCES, scored, listener)


def _score(
    store: Store,
    concept: str,
    method: str,
    scored: Callable[..., scoring.Scored],
    listener: Listener,
) -> Report:
    from personalize_core.metrics import tables

    started, stamp = time.monotonic(), score_stamp(store, concept, method)
    names, folder = store.params.encoders, store.scores(method, concept)
    with store.alone("scores", method, concept):
        skipped = is_up_to_date(folder, stamp)
        if not skipped:
            what, images = f"scoring {concept}, {method}", 1
            listener(Event(what, 0, images))
            concept_images, device = concept_files.concept_images(store.concept_folder(concept)), device_of(store)
            from personalize_core.metrics import features
            from personalize_core.metrics.kept_features import KeptFeatures

            def encoded(done: int, total: int) -> None:
                nonlocal images
                images = total
                if done < total:  # the rest is told when the table is written
                    listener(Event(what, done, total))

            kept = KeptFeatures(store.work("features", *folder.relative_to(store.data).parts))
            processing = features.Processing(workers_of(store), device, kept, encoded)
            with making(store, folder, stamp) as new, store.device():
                encoders = features.load_encoders(**names.model_dump(), device=device)
                found = scored(concept_images, encoders, processing)
                tables.write(found.table, new / SCORES)
                write_json(new / ABSENT, found.absent)
            kept.remove()
            listener(Event(what, images, images))
    metrics = tables.means(tables.read(folder / SCORES))
    return Report(stamp, skipped, time.monotonic() - started, folder / SCORES, metrics)
