"""The training log: one JSON line per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personalize_core.files.atomic import write_bytes

LOG = "train_log.jsonl"


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """rows: as `train` returns them. A method that trains nothing has an empty log."""
    write_bytes(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that `write` wrote."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
