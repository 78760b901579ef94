"""What lies in a workspace, whoever made it: found by the manifests, without computing or loading a model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, changed_files
from personalize_core.files.stamps import stamp_of
from personalize_core.steps.events import Report
from personalize_core.steps.planning import SAMPLE, SCORE, TRAIN, Cell
from personalize_core.steps.training import trained_report
from personalize_core.workspace.external_columns import registered
from personalize_core.workspace.lineage.records import DAMAGED, EDITED, folded, is_genuine, manifest_of
from personalize_core.workspace.recipes import class_preparations, preparations
from personalize_core.workspace.stamps.scoring import is_scored_as_now
from personalize_core.workspace.store import FIGURES, PAGE, REFERENCES, SCORES, Store

LATENTS, CLASS_IMAGES, ARTIFACT, GRID = "latents", "class_images", "artifact", "image_grid"
METRICS, REFERENCE_SCORES, EXTERNAL_METRICS = "metrics", "reference_scores", "external_metrics"
COMPARISON, REPORT = "comparison", "report"
KINDS = (  # inputs come first
    LATENTS, CLASS_IMAGES, ARTIFACT, GRID, REFERENCE_SCORES, METRICS, EXTERNAL_METRICS, COMPARISON, REPORT,
)  # fmt: skip
LATER_THAN = {ARTIFACT: (TRAIN,), GRID: (TRAIN, SAMPLE), METRICS: (TRAIN, SAMPLE, SCORE)}


@dataclass(frozen=True)
class Place:
    """Which result: of one concept and method, of an external column, of one concept, or of all."""

    kind: str
    concept: str | None = None
    method: str | None = None
    label: str | None = None  # of an external column

    @property
    def column(self) -> str:
        """What a comparison has a column for: the method, or the label."""
        return self.method or self.label or ""

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.kind, self.column, self.concept) if part)


def results_there(store: Store, concepts: Sequence[str], kinds: Sequence[str] = KINDS) -> dict[Place, str]:
    """The results of these concepts that have a manifest -> a word that is another one when they are written again.

    Nothing is read: the word is of the manifests' sizes and times. Inputs come before what is made from them.
    """
    found: dict[Place, str] = {}
    for kind in KINDS:
        if kind in kinds:
            found |= dict(_FINDERS[kind](store, set(concepts)))
    return found


def found_report(store: Store, place: Place) -> Report:
    """What the step that made it would report, had it found it current.

    Raises:
        InputError: a manifest is missing or damaged, or a file is not as it was made.
    """
    folders = _folders(store, place)
    if not folders:
        raise InputError(f"{place.name}: {DAMAGED}")
    manifests = [_whole(folder) for folder in folders]
    stamp, folder = str(manifests[0]["stamp"]), folders[0]
    if place.kind in (LATENTS, CLASS_IMAGES):
        common = [_in_common(*each) for each in zip(folders, manifests, strict=True)]
        return Report(common[0], True, 0.0, folder.parent)
    if place.kind == ARTIFACT:
        report = trained_report(stamp, True, 0.0, folder)
        return Report(stamp, True, 0.0, folder, report.metrics, report.images)
    if place.kind == GRID:
        return Report(stamp, True, 0.0, folder, {}, {"grid": folder / "grid.png"})
    if place.kind in (METRICS, REFERENCE_SCORES, EXTERNAL_METRICS):
        from personalize_core.metrics import tables

        images = {"grid": folders[1] / "grid.png"} if place.label else {}
        return Report(stamp, True, 0.0, folder / SCORES, tables.means(tables.read(folder / SCORES)), images)
    figures = folder if place.kind == COMPARISON else folder / FIGURES
    images = {path.stem: path for path in sorted(figures.glob("*.png"))}
    return Report(stamp, True, 0.0, folder if place.kind == COMPARISON else folder / PAGE, {}, images)


def seconds_since(store: Store, place: Place) -> float:
    """How long its manifests have been there, for whoever waits for the files beside them; 0 where one is gone."""
    try:
        changed = [os.stat(folder / MANIFEST).st_ctime for folder in _folders(store, place)]
    except FileNotFoundError:
        return 0.0
    return time.time() - max(changed) if changed else 0.0


def bytes_of(store: Store, place: Place) -> int:
    """How large the files of a result are together, as its manifests say."""
    return sum(
        int(entry.get("bytes", 0))
        for folder in _folders(store, place)
        for entry in manifest_of(folder).get("files", {}).values()
    )


def is_scored(store: Store, label: str, concept: str) -> bool:
    """Has an external column been scored, as is scored now, since it was described?

    No image of it is read: `personalize score` finds out whether one has changed.
    """
    described, listed = store.external(label, concept), store.grid(label, concept) / MANIFEST
    try:
        since = described.stat().st_mtime_ns <= listed.stat().st_mtime_ns
    except OSError:
        return False
    return since and is_scored_as_now(store, concept, label)


def why_out_of_date(store: Store, place: Place, plan: Sequence[Cell]) -> str | None:
    """Why `personalize run` (`score`) would make it again, or what it is made from; None if it would not.

    Args:
        plan: of the concept's cells.
    """
    if place.label and not is_scored_as_now(store, str(place.concept), place.label):
        return "it is scored otherwise now"
    for cell in plan:
        if (cell.concept, cell.method) == (place.concept, place.method) and cell.first in LATER_THAN[place.kind]:
            return cell.why
    return None


# -- inside ---------------------------------------------------------------------------------------------------


def _whole(folder: Path) -> dict:
    manifest = manifest_of(folder)
    if not manifest:
        raise InputError(f"{folder}: {DAMAGED}")
    if not all("bytes" in entry for entry in manifest["files"].values()):
        raise InputError(f"{folder}: {DAMAGED}")
    if changed := changed_files(folder, manifest["files"]):
        raise InputError(f"{folder}: {changed[0]} changed since this was made, or is gone")
    return manifest


def _in_common(folder: Path, manifest: dict) -> str:
    """The stamp of what moments have in common, however their images are prepared (workspace/stamps/latents.py)."""
    if "made_from" not in manifest:
        raise InputError(f"{folder}: {DAMAGED}")
    if not is_genuine(manifest):
        raise InputError(f"{folder}: {EDITED}")
    common = {key: folded(value) for key, value in manifest["made_from"].items() if key != "preprocessing"}
    return str(stamp_of(common))


def _folders(store: Store, place: Place) -> list[Path]:
    """Each with a manifest of its own."""
    concept, method = place.concept or "", place.column
    if place.kind == EXTERNAL_METRICS:
        return [store.scores(method, concept), store.grid(method, concept)]
    if place.kind == LATENTS:
        return _prepared(store.latents(concept), preparations(store))
    if place.kind == CLASS_IMAGES:
        return _prepared(store.class_latents(store.concept(concept).class_noun, ""), class_preparations(store))
    single = {
        ARTIFACT: lambda: store.artifact(method, concept),
        GRID: lambda: store.grid(method, concept),
        METRICS: lambda: store.scores(method, concept),
        REFERENCE_SCORES: lambda: store.scores(REFERENCES, concept),
        COMPARISON: store.comparison,
        REPORT: store.report,
    }
    return [single[place.kind]()]


def _prepared(top: Path, keys: Collection[str]) -> list[Path]:
    """The folders of moments that methods of params.yaml use, without what other methods have left."""
    return [top / key for key in sorted(keys) if (top / key / MANIFEST).is_file()]


def _word(*manifests: Path | str) -> str | None:
    """Of the manifests that are there; None if there are none."""
    found = []
    for path in manifests:
        try:
            about = os.stat(path)
        except OSError:
            continue
        found.append(f"{about.st_mtime_ns:x}.{about.st_size:x}")
    if len(found) > 1:
        return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]
    return found[0] if found else None


def _names(folder: Path | str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _found(place: Place, *manifests: Path | str) -> Iterator[tuple[Place, str]]:
    if word := _word(*manifests):
        yield place, word


def _latents(store: Store, concepts: set[str]) -> Iterator[tuple[Place, str]]:
    top, keys = store.data / "latents", sorted(preparations(store))
    for concept in _names(top):
        if concept in concepts:
            yield from _found(Place(LATENTS, concept), *(f"{top}/{concept}/{key}/{MANIFEST}" for key in keys))


def _class_images(store: Store, concepts: set[str]) -> Iterator[tuple[Place, str]]:
    """Of every concept whose class noun has some; concepts with one noun share them."""
    words: dict[str, str | None] = {}
    if not (store.data / "class_images").is_dir() or not (keys := sorted(class_preparations(store))):
        return
    for concept in sorted(concepts):
        try:
            folder = store.class_latents(store.concept(concept).class_noun, "")
        except InputError:
            continue
        if folder.name not in words:
            words[folder.name] = _word(*(f"{folder}/{key}/{MANIFEST}" for key in keys))
        if word := words[folder.name]:
            yield Place(CLASS_IMAGES, concept), word


def _cells(store: Store, top: Path, kind: str, concepts: set[str]) -> Iterator[tuple[Place, str]]:
    for method in store.without_protocol().params.known_methods:
        for concept in _names(f"{top}/{method}"):
            if concept in concepts:
                yield from _found(Place(kind, concept, method), f"{top}/{method}/{concept}/{MANIFEST}")


def _references(store: Store, concepts: set[str]) -> Iterator[tuple[Place, str]]:
    top = store.sampled / "metrics" / REFERENCES
    for concept in _names(top):
        if concept in concepts:
            yield from _found(Place(REFERENCE_SCORES, concept), f"{top}/{concept}/{MANIFEST}")


def _external(store: Store, concepts: set[str]) -> Iterator[tuple[Place, str]]:
    for label, concept in registered(store):
        if concept in concepts:
            folder = store.scores(label, concept)
            yield from _found(Place(EXTERNAL_METRICS, concept, label=label), folder / MANIFEST)


_FINDERS = {
    LATENTS: _latents,
    CLASS_IMAGES: _class_images,
    ARTIFACT: lambda store, concepts: _cells(store, store.trained / "artifacts", ARTIFACT, concepts),
    GRID: lambda store, concepts: _cells(store, store.sampled / "grids", GRID, concepts),
    REFERENCE_SCORES: _references,
    METRICS: lambda store, concepts: _cells(store, store.sampled / "metrics", METRICS, concepts),
    EXTERNAL_METRICS: _external,
    COMPARISON: lambda store, _: _found(Place(COMPARISON), store.comparison() / MANIFEST),
    REPORT: lambda store, _: _found(Place(REPORT), store.report() / MANIFEST),
}
