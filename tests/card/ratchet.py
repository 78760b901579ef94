"""The recorded costs, which must not grow unnoticed: costs.json, written by `make memory`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.card.cells import EVERY, Cell

FILE = Path(__file__).with_name("costs.json")
ROOM = 0.02  # of memory: another release of a library may hold a little more. Counts must agree.

Recorded = Mapping[str, Mapping[str, int]]
"""What was measured of a cell: "memory", or a stage of training or a sampling strategy -> quantity -> number."""


def read() -> dict[Cell, Recorded]:
    """What was recorded of each cell that there is."""
    by_name = json.loads(FILE.read_text()) if FILE.is_file() else {}
    return {cell: by_name[str(cell)] for cell in EVERY if str(cell) in by_name}


def write(recorded: Mapping[Cell, Recorded]) -> None:
    """A line for each stage, so that a difference between two commits can be read."""
    cells = []
    for cell in EVERY:
        if cell in recorded:
            lines = [f"    {json.dumps(part)}: {json.dumps(numbers)}" for part, numbers in recorded[cell].items()]
            cells.append(f"  {json.dumps(str(cell))}: {{\n" + ",\n".join(lines) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(cells) + "\n}\n")


def differences(recorded: Recorded, now: Recorded) -> list[str]:
    """Every quantity that is not what was recorded, with both numbers; memory may differ by `ROOM`."""
    found = []
    for part in dict.fromkeys([*recorded, *now]):
        before, after = recorded.get(part, {}), now.get(part, {})
        for quantity in dict.fromkeys([*before, *after]):
            one, other = before.get(quantity), after.get(quantity)
            room = ROOM * (one or 0) if quantity.endswith("_mib") else 0
            if one is None or other is None or abs(one - other) > room:
                found.append(f"{part}: {quantity} was {one}, is {other}")
    return found
