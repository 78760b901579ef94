"""A few cells run again, apart from all results, after an upgrade: does a score leave the noise of training?

No stamp names the versions of packages: an upgrade trains nothing again. This looks whether it should have.
"""

from __future__ import annotations

import shutil
import time
from importlib.metadata import distributions
from typing import Any

from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import MANIFEST, read_json, read_record, write_json
from personalize_core.steps.events import Listener, Report, unheard
from personalize_core.steps.sampling import sample_grid
from personalize_core.steps.scores import score
from personalize_core.steps.training import train
from personalize_core.workspace.recipes import device_of
from personalize_core.workspace.store import SCORES, Store

TOLERANCE = 0.02  # of a mean score, where `personalize repeat` has not measured the noise of training
RECORD = "canary.json"


def canary_cells(store: Store) -> list[tuple[str, str]]:
    """The (concept, method) of params.yaml, automation.canary."""
    return [(concept, method) for concept, methods in store.params.automation.canary.items() for method in methods]


def upgrades(store: Store) -> dict[str, str] | None:
    """Each package that is another one than at the last run -> "old -> new"; None: the canary never ran.

    Another list of cells counts as never.
    """
    last = _record(store).get("last", {})
    if last.get("cells") != [f"{concept}/{method}" for concept, method in canary_cells(store)]:
        return None
    before, now = last["versions"], _installed()
    names = sorted({*before, *now})
    return {
        name: f"{before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in names
        if before.get(name) != now.get(name)
    }


def run_canary(store: Store, listener: Listener = unheard) -> Report:
    """Train, sample and score the cells anew, in a folder of its own, and compare with the first time.

    A cell is compared where it depends on the same inputs, by content, and ran on the same kind of device; else what
    it scores now is what later runs are compared with.

    Raises:
        InputError: params.yaml names no cells, or one that cannot be trained.
    """
    cells = canary_cells(store)
    if not cells:
        raise InputError(
            "params.yaml names no cells for the canary; write some as `automation: { canary: { CONCEPT: [METHOD] } }`"
        )
    started, path = time.monotonic(), store.data / "canary" / RECORD
    with store.alone("canary"), store.device():
        scratch = _scratch(store, sorted({concept for concept, _ in cells}))
        try:
            measured = {f"{concept}/{method}": _run(scratch, concept, method, listener) for concept, method in cells}
        finally:
            shutil.rmtree(scratch.root, ignore_errors=True)
        baseline = _record(store).get("baseline", {})
        moved = []
        for name, cell in measured.items():
            if name in baseline and _same_inputs(baseline[name], cell):
                moved += _moved(store, name, baseline[name]["scores"], cell["scores"])
            else:
                baseline[name] = cell
        last = {"versions": _installed(), "cells": list(measured), "measured": measured, "moved": moved}
        write_json(path, {"baseline": {name: baseline[name] for name in measured}, "last": last})
    metrics = {f"{name}.{metric}": value for name, cell in measured.items() for metric, value in cell["scores"].items()}
    stamp = "-".join(cell["stamp"] for cell in measured.values())
    return Report(stamp, False, time.monotonic() - started, path, metrics)


def moved(store: Store) -> list[str]:
    """What left its noise band in the last run, a sentence each."""
    return _record(store).get("last", {}).get("moved", [])


def accept_canary(store: Store) -> None:
    """What the last run scored is right: later ones are compared with it.

    Raises:
        InputError: it never ran.
    """
    record = _record(store)
    if not record:
        raise InputError("the canary has not run yet; `personalize canary` runs it")
    record["baseline"], record["last"]["moved"] = record["last"]["measured"], []
    write_json(store.data / "canary" / RECORD, record)


def _scratch(store: Store, concepts: list[str]) -> Store:
    """A workspace that shares with this one what people put there, and what they asked for before they trained: the
    class nouns suggested. Nothing else that steps make."""
    root = store.work("canary")
    shutil.rmtree(root, ignore_errors=True)
    (root / "data" / "concepts").mkdir(parents=True)
    shutil.copyfile(store.root / "params.yaml", root / "params.yaml")
    for name in concepts:
        store.concept(name)
        shutil.copytree(store.concept_folder(name), root / "data" / "concepts" / name)
    for name in ("prompts", "regularization", "analyses/class_nouns"):
        if (store.data / name).is_dir():
            (root / "data" / name).parent.mkdir(exist_ok=True)
            (root / "data" / name).symlink_to(store.data / name)
    return Store(root)


def _run(scratch: Store, concept: str, method: str, listener: Listener) -> dict[str, Any]:
    from personalize_core.metrics import tables

    for step in (train, sample_grid, score):
        step(scratch, concept, method, listener)
    folder = scratch.scores(method, concept)
    table = tables.read(folder / SCORES).filter("headline")
    scores = {
        f"{variant}.{metric}": float(group["score"].to_numpy().mean())
        for (variant, metric), group in table.group_by("variant", "metric", maintain_order=True)
    }
    return {"stamp": read_json(folder / MANIFEST)["stamp"], "device": device_of(scratch), "scores": scores}


def _same_inputs(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(before[name] == now[name] for name in ("stamp", "device"))


def _moved(store: Store, cell: str, before: dict[str, float], now: dict[str, float]) -> list[str]:
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        variant, _, metric = name.rpartition(".")
        least, by = noise_band(store, cell.partition("/")[0], variant, metric)
        if old is None or new is None or not abs(new - old) <= least:  # NaN leaves every band
            values = " -> ".join("absent" if value is None else f"{value:.4f}" for value in (old, new))
            found.append(f"{cell}: {variant}'s {metric} {values}; up to {least:.4f} is {by}")
    return found


def noise_band(store: Store, concept: str, variant: str, metric: str) -> tuple[float, str]:
    """By how much a mean score may differ between two trainings, and why so much."""
    import polars as pl

    from personalize_core.report.comparison_in_words import NOISE

    path = store.comparison() / NOISE
    if path.is_file():
        measured = pl.read_parquet(path).filter(concept=concept, variant=variant, metric=metric)["least"].drop_nulls()
        if len(measured):  # several encoders may measure one metric: the widest band
            return max(measured), "the noise of training, as `personalize repeat` measured it"
    return TOLERANCE, "the tolerance where no noise of training was measured"


def _installed() -> dict[str, str]:
    return dict(sorted((found.name.lower(), found.version) for found in distributions() if found.name))


def _record(store: Store) -> dict[str, Any]:
    return read_record(store.data / "canary" / RECORD)


def why_canary(upgraded: dict[str, str] | None) -> str:
    """Why it is due; "" if it is not."""
    if upgraded is None:
        return "it has not run yet with these cells"
    return listed(f"{name} {versions}" for name, versions in upgraded.items()) if upgraded else ""
