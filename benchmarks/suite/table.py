"""The table of a run: printed as Markdown, written as JSON."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.timing import Measured
from personalize_core.files.atomic import write_json

HEAD = ("part", "what", "beside", "ours", "theirs", "ours / theirs", "floor", "results differ by", "")


def markdown(rows: Sequence[Measured]) -> str:
    """Times are medians; behind a ratio of medians of rounds stand its quartiles."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(row: Measured) -> str:
    ratio = row.ratio
    cells = (
        row.part,
        row.what,
        row.theirs,
        _time(_median(row.our_seconds), row.unit),
        _time(_median(row.their_seconds), row.unit),
        f"**{ratio.median:.2f}** ({ratio.lower:.2f} to {ratio.upper:.2f})",
        "" if row.floor is None else _time(row.floor, row.unit),
        "" if row.apart is None else f"{row.apart:.0e}",
        row.about,
    )
    return "| " + " | ".join(cells) + " |"


def _median(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


def _time(seconds: float, unit: str) -> str:
    return f"{seconds:.1f} s" if unit == "cell" else f"{1000 * seconds:.3g} ms"


def machine(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def write(path: Path, rows: Sequence[Measured], about: dict[str, Any]) -> None:
    """All times of all rounds, and what they were measured on."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, about | {"written": now, "torch": torch.__version__, "rows": [row.as_json() for row in rows]})
