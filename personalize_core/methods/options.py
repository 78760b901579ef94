"""Options that are checked when they are set: of a method's recipe, and of how it samples."""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def options(kind: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked when it is created: for a method's Config and Sampling."""
    # Validators are built on first use: importing every method's recipe then costs little.
    config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)
    checked: Any = validated_dataclass(frozen=True, config=config)
    return checked(kind)
