"""Measure one method on the pretended card: `python -m tests.card.measure sd-1.4 dreambooth bf16 --lines --largest 20`.

It prints the peak of every stage of training, of the proof and of sampling, the waits of the host, copies and FLOPs of
a step; with --lines which lines of personalize_core waited and copied, with --largest what was there at the peak.
"""

from __future__ import annotations

# isort: off
from tests.card.guard import WHY_NOT  # first, since it must come before torch

# isort: on
import argparse
import gc
import sys
import time
from typing import get_args

from personalize_core.methods import RECIPES
from tests.card.card import pretended_card
from tests.card.cells import Base, Cell, Setting
from tests.card.costs import GIB, CellCost, StepCost
from tests.card.measuring import measured
from tests.card.watch import WATCH


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.card.measure", description=__doc__)
    parser.add_argument("base", choices=get_args(Base))
    parser.add_argument("method", choices=RECIPES)
    parser.add_argument("setting", choices=get_args(Setting), nargs="*", default=list(get_args(Setting)[:2]))
    parser.add_argument("--lines", action="store_true", help="which lines waited and copied")
    parser.add_argument("--largest", type=int, default=0, help="how many of the largest holders of memory to list")
    chosen = parser.parse_args(arguments)
    if WHY_NOT:
        sys.exit(WHY_NOT)
    gc.freeze()  # what was imported is no garbage
    gc.enable()
    WATCH.by_line = bool(chosen.largest)
    with pretended_card(meta=True):
        for setting in chosen.setting:
            cell, started = Cell(chosen.base, chosen.method, setting), time.monotonic()
            cost = measured(cell)
            print(f"{cell}: measured in {time.monotonic() - started:.0f} s")
            show(cost, chosen.lines, chosen.largest)


def show(cost: CellCost, lines: bool, largest: int) -> None:
    rows = {
        "base model": cost.base_model,
        "base model, while it is loaded": cost.loading,
        "the method beside it": cost.learned,
        "held after training": cost.held,
        "left when the method is gone": cost.left,
    }
    if cost.proof is not None:
        rows["proof, of one process"] = cost.proof
    for what, size in rows.items():
        print(f"  {what:32} {size / GIB:6.2f} GiB")
    steps = {f"training, {name}": step for name, step in cost.stages.items()} | {"a probe": cost.probe}
    for what, step in (steps | {f"sampling, {name}": step for name, step in cost.sampling.items()}).items():
        print(f"  {what:32} {step.peak / GIB:6.2f} GiB{_details(step)}")
        for line, count in step.lines.items() if lines else ():
            print(f"      {count:4} x {line}")
        for line, size in list(step.at_peak.items())[:largest]:
            print(f"      {size / GIB:6.2f} GiB {line}")


def _details(step: StepCost) -> str:
    flops = " + ".join(f"{count / 1e12:.2f} {dtype}" for dtype, count in sorted(step.flops.items()))
    optimizer = f" ({step.in_optimizer / GIB:.2f} in the optimizer)" if step.in_optimizer else ""
    counts = f"{step.waits} waits, {step.copies} copies ({step.blocking} blocking), {step.calls} calls"
    return f"{optimizer}; TFLOP {flops}; {counts}"


if __name__ == "__main__":
    main(sys.argv[1:])
