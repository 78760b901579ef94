"""What numbers may be, whichever method they are of: limits on what costs time and memory, by the last words of a key.

A method's file says what its numbers mean, and what they must be at least. How large is too large to be meant is the
same for all of them: it is said here, with what the number would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator

from personalize_core.errors import shown

# Rules of thumb for Stable Diffusion at 512 pixels on one fast graphics card; what a workspace has recorded is better.
TRAINING_STEPS_A_SECOND = 5.0
SECONDS_AN_IMAGE = 2.0
BYTES_AN_IMAGE = 0.5e6
BYTES_A_TRAINED_IMAGE = 1.5e9  # of memory, for each image of a training batch


@dataclass(frozen=True)
class Limit:
    """The most that a number may be, and what that many cost."""

    most: float
    cost: Callable[[float], str]


def time_of(seconds: float) -> str:
    """A duration for people, with its unit: '3 hours'."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def size_of(count: float) -> str:
    """A number of bytes for people: '3 GB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= 2 * size:
            return f"{count / size:,.0f} {unit}"
    return f"{count / 1e6:,.0f} MB"


def cost_of_images(count: float) -> str:
    return f"{count:,.0f} images take about {time_of(count * SECONDS_AN_IMAGE)} and {size_of(count * BYTES_AN_IMAGE)}"


def _cost_of_steps(count: float) -> str:
    return f"{count:,.0f} steps take about {time_of(count / TRAINING_STEPS_A_SECOND)}"


def _cost_of_batch(count: float) -> str:
    return f"a batch of {count:,.0f} takes about {size_of(count * BYTES_A_TRAINED_IMAGE)} of memory"


NO_NUMBER = "it should be a number"
MOST = 1_000_000  # of any number of a recipe that has no limit of its own
LIMITS = {
    "steps": Limit(1_000_000, _cost_of_steps),
    "batch_size": Limit(1024, _cost_of_batch),
    "class_images": Limit(100_000, cost_of_images),
    "lr": Limit(100.0, lambda rate: "no training converges at such a rate"),
    "weight": Limit(1e6, lambda weight: "the other losses would not count beside it"),
}


def beyond_limits(key: str, value: float) -> str | None:
    """What is wrong with the size of a recipe's number under this key, or None."""
    limit = next((LIMITS[end] for end in LIMITS if f"_{key}".endswith(f"_{end}")), None)
    if limit and value > limit.most:
        return f"it should be at most {limit.most:,.0f}{f'; {limit.cost(value)}' if value < 1e30 else ''}"
    return f"it should be at most {MOST:,.0f}" if value > MOST else None


def switches_for_numbers(written: Any, hint: Any, where: str = "") -> Iterator[str]:
    """Where a person wrote true or false, and a number is asked for: pydantic takes them for 1 and 0.

    Args:
        written: mappings, lists and values as a person wrote them.
        hint: the type that they are to become. A validator that sees a value before pydantic says itself what it takes.
    """
    kinds = list(_alternatives(hint))
    if isinstance(written, bool):
        if {int, float}.intersection(kinds) and bool not in kinds:
            yield f"{where} = {shown(written)}: {NO_NUMBER}"
    elif isinstance(written, Mapping):
        for key, value in written.items():
            for kind in kinds:
                if get_origin(kind) is dict:
                    inner = get_args(kind)[1]
                else:
                    inner = _fields(kind).get(str(key)) if hasattr(kind, "__pydantic_fields__") else None
                yield from switches_for_numbers(value, inner, f"{where}.{key}" if where else str(key))
    elif isinstance(written, list | tuple):
        inner = [get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)]
        for number, value in enumerate(written):
            for each in inner:
                yield from switches_for_numbers(value, each, f"{where}.{number}")


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _alternatives(each)
    elif get_origin(hint) is Annotated:
        if not any(isinstance(more, BeforeValidator) for more in hint.__metadata__):
            yield from _alternatives(get_args(hint)[0])
    else:
        yield hint


@cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
