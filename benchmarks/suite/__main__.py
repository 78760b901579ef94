"""Measure, print the table and write it: `python -m benchmarks.suite`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

# isort: off
import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch
import torch
# isort: on

from benchmarks.suite import cell, quiet, sampling, table, training
from benchmarks.suite.bare import compare_bare
from benchmarks.suite.models import Precision, Size
from benchmarks.suite.scoring import compare_scoring
from benchmarks.suite.setting import ROOT, Models, Setting
from benchmarks.suite.timing import Deadline, Measured, load
from personalize_core.methods import METHOD_NAMES

RESULTS = ROOT / "data" / ".work" / "bench"
PARTS = ("training", "bare", "sampling", "scoring", "cell")


def measure(
    setting: Setting, cells: cell.Amounts, only: str, heard: Callable[[Measured], None], methods: Sequence[str] = ()
) -> list[Measured]:
    """Every row of the table, in order, or those of one part.

    Args:
        only: one of `PARTS`; empty for all.
        heard: is told of each row when it is measured.
        methods: those to train; all if empty.
    """
    rows: list[Measured] = []

    def add(row: Measured) -> None:
        rows.append(row)
        heard(row)

    best = None
    if only in ("", "training"):
        for name in [pair for pair in training.PAIRS if pair in (methods or training.PAIRS)]:
            add(training.compare_training(setting, name))
    if only in ("", "bare"):
        for name in methods or METHOD_NAMES:
            for row in compare_bare(setting, name):
                add(row)
    if only in ("", "sampling"):
        for name in sampling.SAMPLED:
            row, best = sampling.compare_sampling(setting, name, best)
            add(row)
    if only in ("", "scoring"):
        add(compare_scoring(setting))
    if only in ("", "cell"):
        for name in cell.CELLS:
            add(cell.compare_cell(setting, name, cells, best or 8))
    return rows


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=get_args(Size), default="mini", help="of the base model")
    parser.add_argument("--quick", action="store_true", help="tiny models, and as little as possible of everything")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of the U-Net")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a training in one round")
    parser.add_argument("--images", type=int, default=16, help="sampled in one round, and scored")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cell-steps", type=int, default=50, help="of the training of a whole cell")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--only", choices=PARTS, default="")
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=[], help="to train; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for the table as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Path:
    """Returns the file with the table."""
    chosen, began = parsed(arguments), time.monotonic()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
    size: Any = "tiny" if chosen.quick else chosen.size
    amounts = (1, 2, 4, 2) if chosen.quick else (chosen.rounds, chosen.steps, chosen.images, chosen.sampling_steps)
    cells = cell.Amounts(2, 1, 2) if chosen.quick else cell.Amounts(chosen.cell_steps, 2, chosen.sampling_steps)
    torch.set_num_threads(chosen.threads)
    setting = Setting(Models(size, device, chosen.precision), *amounts, Deadline(), uncounted=0 if chosen.quick else 1)
    about = {
        "machine": table.machine(device),
        "load": load(),
        "command": " ".join(["python -m benchmarks.suite", *(sys.argv[1:] if arguments is None else arguments)]),
        "size": size,
        "precision": chosen.precision,
        "matrix_rate": setting.models.rate,
    }
    rate = f"matrix products at {setting.models.rate / 1e9:.0f} GFLOP/s"
    print(f"{size}, {chosen.precision}, {about['machine']}, {rate}, load {about['load']:.1f}", flush=True)
    heard: list[Measured] = []

    def hear(row: Measured) -> None:
        heard.append(row)
        print(f"{time.monotonic() - began:5.0f} s  {row.part}, {row.what}: {row.ratio.median:.2f}", flush=True)
        table.write(path, heard, about)

    path = chosen.results / f"{size}_{chosen.precision}_{device}.json"
    rows = measure(setting, cells, chosen.only, hear, chosen.methods)
    print(f"\n{table.markdown(rows)}\n\n{time.monotonic() - began:.0f} s, load {load():.1f}; {os.path.relpath(path)}")
    return path


if __name__ == "__main__":
    quiet.hide_notices()
    main()
