"""How many rows of a training batch pass through the U-Net at once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _checked(value: Any) -> int | Literal["auto"] | None:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("it should be a number of rows, 1 or more; auto; or null, for the whole batch at once")


MicroBatch = Annotated[int | Literal["auto"] | None, BeforeValidator(_checked)]
"""Rows at once; None: all of a batch. "auto": all, and half as many each time that a graphics card's memory does not
suffice."""


@dataclass
class RowsAtOnce:
    """A batch in parts, whose gradients add up to the batch's.

    Halving is remembered: what did not fit once is not tried again.
    """

    rows: int | None = None  # None: all
    automatic: bool = False

    @classmethod
    def of(cls, setting: MicroBatch) -> RowsAtOnce:
        return cls(automatic=True) if setting == "auto" else cls(setting)

    def parts(self, size: int) -> list[slice]:
        """Slices of a batch of `size` rows, in order."""
        step = min(self.rows or size, size)
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def halve(self, size: int) -> bool:
        """Take half as many rows of a batch of `size`; False if this was not asked for, or one row is the least."""
        now = min(self.rows or size, size)
        if not self.automatic or now == 1:
            return False
        self.rows = -(-now // 2)
        _log.warning(
            "The graphics card's memory does not suffice for %d rows at once; training goes on with %d, which learns "
            "the same (micro_batch: auto).",
            now,
            self.rows,
        )
        return True


_log = logging.getLogger(__name__)
