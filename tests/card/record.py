"""Measure every cell and write tests/card/costs.json and docs/memory.md: `make memory`.

`python -m tests.card.record NAME...` measures those methods, or on those base models, alone and keeps what is recorded
of the others.
"""

from __future__ import annotations

# isort: off
from tests.card.guard import WHY_NOT  # first, since it must come before torch

# isort: on
import gc
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

from personalize_core.methods import RECIPES
from tests.card import memory_page, ratchet
from tests.card.card import pretended_card
from tests.card.cells import EVERY, Base, Cell
from tests.card.measuring import measured
from tests.card.ratchet import Recorded


def main(chosen: list[str]) -> None:
    if WHY_NOT:
        sys.exit(WHY_NOT)
    known = [*RECIPES, *get_args(Base)]
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"there is no method or base model {unknown[0]!r}; there are {', '.join(known)}")
    cells = [cell for cell in EVERY if not chosen or cell.method in chosen or cell.base in chosen]
    recorded, started = dict(ratchet.read()), time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done, (cell, cost) in enumerate(zip(cells, pool.map(_recorded, cells), strict=True), start=1):
            recorded[cell] = cost
            ratchet.write(recorded)
            print(f"{done} of {len(cells)} after {time.monotonic() - started:.0f} s: {cell}", flush=True)
    memory_page.PAGE.write_text(memory_page.text(ratchet.read()))
    print(f"wrote {ratchet.FILE} and {memory_page.PAGE}")


def _recorded(cell: Cell) -> Recorded:
    gc.freeze()  # what was imported is no garbage
    gc.enable()
    with pretended_card(meta=True):
        return measured(cell).recorded()


if __name__ == "__main__":
    main(sys.argv[1:])
