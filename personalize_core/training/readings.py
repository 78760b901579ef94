"""Numbers that a graphics card computes step by step, read by the host for several steps at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# To read a number the host waits until the card has done all that it was told, and the card then waits for the host to
# tell it more. A loss that is no number is noticed so many steps late at most.
TOGETHER = 10


class Readings:
    """Writes numbers into the rows of a log once they are read; until then None stands in their place.

    On a CPU they are read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._together = 1 if device.type == "cpu" else TOGETHER
        self._steps = 0
        self._unread: list[tuple[dict[str, Any], list[str], Tensor, str | None]] = []

    def add(self, into: dict[str, Any], numbers: Mapping[str, Tensor], what: str | None = None) -> None:
        """Have each number, of 0 dimensions and one type, written under its name; behind what is there.

        Args:
            what: what the numbers are, where they must be finite; raises FloatingPointError when one is read that is
                not.
        """
        if not numbers:
            return
        into |= dict.fromkeys(numbers)
        self._unread.append((into, [*numbers], torch.stack([*numbers.values()]), what))
        if self._together == 1:
            self.read()

    def end_step(self) -> None:
        """Reads, if enough steps have been taken."""
        self._steps += 1
        if self._steps >= self._together:
            self.read()

    def read(self) -> None:
        """All that is still unread, in one copy.

        Raises:
            FloatingPointError: of the first step with a number that should be finite and is not.
        """
        unread, self._unread, self._steps = self._unread, [], 0
        values = iter(torch.cat([stacked for _, _, stacked, _ in unread]).tolist() if unread else [])
        for into, names, _, what in unread:
            read = {name: next(values) for name in names}
            into |= read
            if what is not None and not all(map(math.isfinite, read.values())):
                described = ", ".join(f"{name} = {value:.3g}" for name, value in read.items())
                raise FloatingPointError(f"{what}: the loss is {described}")
