"""A comparison to a report: one page for people, and its figures and tables as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from personalize_core.files.atomic import MANIFEST, is_up_to_date, read_result
from personalize_core.files.stamps import sha256, sources_hash, stamp_of
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.stamps.made import manifest_stamp
from personalize_core.workspace.stamps.sources import REPORTING
from personalize_core.workspace.store import FIGURES, PAGE, SCORES, Store

SOURCES = Path(__file__).parents[1] / "report"


def report(store: Store, listener: Listener = unheard) -> Report:
    """The last comparison as one self-contained page, in a folder with all of its figures and tables.

    Raises:
        InputError: nothing has been compared, or an image that was scored is gone or another one by now.
    """
    from personalize_core.metrics import parquet

    started, folder, compared = time.monotonic(), store.report(), store.comparison()
    agreed = store.agreement() / MANIFEST
    stamp_there = manifest_stamp(compared, f"nothing has been compared in {compared}", "run `personalize compare`")
    scores = parquet.read_parquet(compared / SCORES)
    cells = scores.select("method", "concept").unique().sort("method", "concept").rows()
    stamp = stamp_of(
        {
            "comparison": stamp_there,
            "cells": {f"{method}/{concept}": _behind(store, method, concept) for method, concept in cells},
            "costs": sha256(store.costs()) if store.costs().is_file() else None,
            "sources": sources_hash(REPORTING),
            **({"agreement": read_result(agreed, stamp=str)["stamp"]} if agreed.is_file() else {}),
            "report": {path.name: sha256(path) for path in sorted(SOURCES.iterdir()) if path.is_file()},
        }
    )
    with store.alone("report"):
        skipped = is_up_to_date(folder, stamp)
        if not skipped:
            from personalize_core.report import page

            listener(Event("writing the report", 0, 1))
            with making(store, folder, stamp) as new:
                page.write(store, new)
            listener(Event("writing the report", 1, 1))
    images = {path.stem: path for path in sorted((folder / FIGURES).glob("*.png"))}
    return Report(stamp, skipped, time.monotonic() - started, folder / PAGE, {}, images)


def _behind(store: Store, method: str, concept: str) -> list[Any]:
    """What the page shows of a cell besides its scores: artifact, grid, heat maps and analyses, by their stamps."""
    heat_maps = sorted(store.samples(method, concept, "any").parent.glob("*/heat_maps.json"))
    folders = [store.artifact(method, concept), store.grid(method, concept), store.analyses(method, concept)]
    manifests = [folder / MANIFEST for folder in [*folders, *(path.parent for path in heat_maps)]]
    return [read_result(path, stamp=str)["stamp"] if path.is_file() else None for path in manifests]
