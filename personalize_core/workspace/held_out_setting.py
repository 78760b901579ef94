"""params.yaml, held_out: how many concept images, or which share of them, are held back from training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

MOST = 1000


def _checked(value: Any) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError(
        f"it should be a number of images, from 0 to {MOST}, or a share of them between 0 and 1, such as 0.25"
    )


HeldOut = Annotated[int | float, BeforeValidator(_checked)]
