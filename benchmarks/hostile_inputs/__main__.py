"""Give a corpus of hostile and harmless inputs to the program, and count what becomes of them.

`python -m benchmarks.hostile_inputs [--inputs FOLDER] [--only KIND] [--seconds 60] [--memory 6]`

Each input is read by the function that a command calls with it, in a process of its own that is forked from one which
has imported all libraries, loaded a model and computed nothing. For each it is known whether it must be accepted, and
as what, or refused; damaged bytes may be either. Everything but a right acceptance and a refusal in a sentence is a
fault: it is printed by name, and the exit status is 1. The models are the tests' tiny ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch
from benchmarks.hostile_inputs import answers, folders, images, imports, reported, results, settings, workspaces
from benchmarks.hostile_inputs.runner import ACCEPTED, CLASSES, REFUSED, Case, Limits, Outcome, idle_memory, run

KINDS: dict[str, ModuleType] = {
    "images": images,
    "folders": folders,
    "settings": settings,
    "imports": imports,
    "results": results,
    "answers": answers,
}


def cases(chosen: str | None, folder: Path, inputs: Path | None) -> Iterator[Case]:
    """All of them, or those of one kind; what they are made from is prepared in the folder first."""
    for name, kind in KINDS.items():
        if chosen in (None, name):
            kind.prepare(folder)
            yield from kind.cases(folder)
    if inputs and chosen in (None, "reported"):
        reported.prepare(folder)
        yield from reported.cases(folder, inputs)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--inputs", type=Path, metavar="FOLDER", help="also files of public bug reports")
    arguments.add_argument("--only", choices=[*KINDS, "reported"], help="inputs of this kind alone")
    arguments.add_argument("--seconds", type=float, default=60, help="an input that takes longer is a hang")
    arguments.add_argument("--memory", type=float, default=6, help="GB; an input that takes more is counted as memory")
    chosen = arguments.parse_args()
    if chosen.inputs and not chosen.inputs.is_dir():
        arguments.error(f"{chosen.inputs} is no folder")
    workspaces.shorten()
    outcomes, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for case in cases(chosen.only, root, chosen.inputs):
            if len(outcomes) % 50 == 0:
                print(f"{len(outcomes)} inputs after {time.monotonic() - begun:.0f} s", flush=True)
                limits = Limits(chosen.seconds, round(chosen.memory * 1e9), idle_memory())
            outcome = run(case, root / "case", limits)
            outcomes.append(outcome)
            if outcome.found not in (ACCEPTED, REFUSED):
                print(f"{outcome.found}: {outcome.name}: {outcome.what}", flush=True)
    show(outcomes, time.monotonic() - begun)
    sys.exit(any(outcome.found not in (ACCEPTED, REFUSED) for outcome in outcomes))


def show(outcomes: list[Outcome], seconds: float) -> None:
    counts = Counter(outcome.found for outcome in outcomes)
    print(f"{len(outcomes)} inputs in {seconds:.0f} s:")
    for found in CLASSES:
        print(f"{counts[found]:6d} {found}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.memory)
    print(f"longest: {slowest.seconds:.1f} s, {slowest.name}")
    print(f"most memory: {largest.memory / 1e6:.0f} MB, {largest.name}")


if __name__ == "__main__":
    main()
