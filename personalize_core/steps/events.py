"""What a step tells those who watch it, and what it did when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """What a step is doing, for whoever shows progress."""

    what: str  # e.g. "training dreambooth on dog7"
    done: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)  # e.g. this step's loss


Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """The listener of those who do not watch."""


@dataclass(frozen=True)
class Report:
    """What a step did."""

    stamp: str  # names everything the result depends on: the data version
    skipped: bool  # it was there already
    seconds: float
    path: Path  # the folder or table
    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)  # for people to look at
    notices: Sequence[str] = ()  # what a person should know of it, a line each


def report_over(
    made: Mapping[str, Report], stamp: str, started: float, folder: Path, metrics: dict[str, float]
) -> Report:
    """One report over several, with a stamp of its own."""
    skipped = all(report.skipped for report in made.values())
    return Report(stamp, skipped, time.monotonic() - started, folder, metrics)
