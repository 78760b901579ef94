"""Images to scores: a table with a row per image and metric."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import is_up_to_date, read_results, write_json
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.lineage.records import files_trained_on
from personalize_core.workspace.recipes import device_of, split_of, workers_of
from personalize_core.workspace.stamps.scoring import score_stamp, without_identity
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store, is_label

if TYPE_CHECKING:
    from personalize_core.metrics import features, scoring


def score(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Every image of a grid against its text and the concept's images, a row per image and metric.

    method: or the label of an external column whose images have been listed.

    Raises:
        InputError: an image that is held out now was trained on.
    """
    if not is_label(method):
        store.params.check_method(method)
    grid = store.grid(method, concept)

    def scored(
        images: list[Path],
        held_out: list[Path] | None,
        encoders: features.Encoders,
        processing: features.Processing,
    ) -> scoring.Scored:
        from personalize_core.metrics import scoring

        described, skipped = store.concept(concept), set(without_identity(store, concept, method))
        return scoring.score_grid(store.root, grid, described, images, encoders, skipped, processing, held_out)

    with store.alone("grid", method, concept):  # whoever samples it anew: what is named is what is scored
        _check_held_out(store, concept, method)
        return _score(store, concept, method, scored, listener)


def score_references(store: Store, concept: str, listener: Listener = unheard) -> Report:
    """The concept's images against each other: what even real images reach."""

    def scored(
        images: list[Path],
        held_out: list[Path] | None,
        encoders: features.Encoders,
        processing: features.Processing,
    ) -> scoring.Scored:
        from personalize_core.metrics import scoring

        return scoring.score_references(store.root, store.concept(concept), images, encoders, held_out)

    return _score(store, concept, REFERENCES, scored, listener)


def left_out(store: Store, concept: str, method: str) -> list[str]:
    """A line for each image that has no score at all, as one that cannot be read: its name and the reason."""
    found = read_results(store.scores(method, concept) / ABSENT, "metric", "image", "reason")
    return [f"{one['image']} {one['reason']}" for one in found if one["metric"] is None and one["image"] is not None]


def _score(
    store: Store,
    concept: str,
    method: str,
    scored: Callable[..., scoring.Scored],
    listener: Listener,
) -> Report:
    from personalize_core.metrics import tables

    started, stamp = time.monotonic(), score_stamp(store, concept, method)
    folder = store.scores(method, concept)
    with store.alone("scores", method, concept):
        skipped = is_up_to_date(folder, stamp)
        if not skipped:
            what, images = f"scoring {concept}, {method}", 1
            listener(Event(what, 0, images))
            concept_images, device = concept_files.concept_images(store.concept_folder(concept)), device_of(store)
            held_out = None
            if store.params.held_out:
                names = split_of(store, concept).held_out
                held_out = [path for path in concept_images if path.name in names]
                concept_images = [path for path in concept_images if path.name not in names]
            from personalize_core.metrics import features
            from personalize_core.metrics.kept_features import KeptFeatures

            def encoded(done: int, total: int) -> None:
                nonlocal images
                images = total
                if done < total:  # the rest is told when the table is written
                    listener(Event(what, done, total))

            kept = KeptFeatures(store.work("features", *folder.relative_to(store.data).parts))
            processing = features.Processing(workers_of(store), device, kept, encoded)
            with making(store, folder, stamp) as new:
                with store.device():
                    encoders = features.load_encoders(**store.params.encoders.model_dump(), device=device)
                    begun = time.monotonic()
                    found = scored(concept_images, held_out, encoders, processing)
                    seconds = time.monotonic() - begun
                if store.params.judge:
                    from personalize_core.steps.judging import add_judged

                    add_judged(store, concept, method, found, concept_images, held_out, listener)
                tables.write(found.table, new / SCORES)
                write_json(new / ABSENT, found.absent)
                # before the scores appear, as the other costs
                write_json(store.scoring_costs(method, concept), {"stamp": stamp, "scoring_seconds": seconds})
            kept.remove()
            listener(Event(what, images, images))
    metrics = tables.means(tables.read(folder / SCORES))
    return Report(stamp, skipped, time.monotonic() - started, folder / SCORES, metrics)


def _check_held_out(store: Store, concept: str, method: str) -> None:
    """Raise InputError if the artifact behind the grid was trained on an image that is held out now."""
    if not store.params.held_out:
        return
    files, folder = concept_files.content(store.concept_folder(concept)), store.artifact(method, concept)
    trained_on = set(files_trained_on(folder).values())
    if seen := [name for name in split_of(store, concept).held_out if files[name] in trained_on]:
        raise InputError(
            f"{method} was trained on {listed(seen)} of {concept!r}, which params.yaml holds out now, so scores with "
            f"it would reward copying; train it again with `personalize run {concept} -m {method}`"
        )
