"""What training looked like: one JSON line per step, and its curve for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personalize_core import figures
from personalize_core.files import write_bytes

LOG, CURVE = "train_log.jsonl", "loss.png"


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """rows: as `train` returns them. A method that trains nothing has an empty log and no curve."""
    write_bytes(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if rows:
        figures.loss_curve(rows, folder / CURVE)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that `write` wrote."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
