"""Two ways to do the same work, taking turns, and what their times say."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


def now(device: str) -> float:
    """Seconds of the clock; on a CPU those in which it worked for this process and for children that have ended.

    Others work on the CPU too, and would be measured with us.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + of_children.ru_utime + of_children.ru_stime


def seconds_of(work: Callable[[], Any], device: str) -> float:
    began = now(device)
    work()
    return now(device) - began


class Deadline:
    """A moment by which a measurement is to end with what it has."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.at - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """The same, or one in so many seconds if that is earlier."""
        return Deadline(min(self.left, seconds))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        if len(numbers) < 2:
            return cls(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Measured:
    """One row of the table: the same work by two."""

    part: str  # training, sampling, scoring, whole cell
    what: str
    theirs: str  # whom we are compared with
    unit: str  # what the times are of: step, image, cell
    our_seconds: Sequence[float]  # of each round, per unit
    their_seconds: Sequence[float]
    flops: float | None  # per unit, the fewer of both; None: not counted
    floor: float | None  # seconds per unit
    apart: float | None  # how far the results differ, relative to the largest number; None: they are random
    load: float  # the machine's load average while it was measured
    about: str = ""  # what else the reader must know

    @property
    def ratio(self) -> Spread:
        """Our time by theirs, of each round; below 1 we are faster."""
        return Spread.of([own / other for own, other in zip(self.our_seconds, self.their_seconds, strict=True)])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": asdict(self.ratio)}


def timed(work: Callable[[], Any], device: str) -> Callable[[], float]:
    """One of the `ways` of `take_turns`."""
    return lambda: seconds_of(work, device)


def take_turns(
    ways: Mapping[str, Callable[[], float]],
    rounds: int,
    deadline: Deadline,
    before: Callable[[], Any] = lambda: None,
    uncounted: int = 1,
) -> dict[str, list[float]]:
    """What every way returns, round by round.

    The order changes with every round. At the deadline it ends, with one round at least.

    Args:
        ways: each does the work and returns its seconds.
        before: what is done before each way.
        uncounted: rounds before those that count, for what only a first call costs.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-uncounted, rounds):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            before()
            seconds = ways[name]()
            if turn >= 0:
                times[name].append(seconds)
        if turn >= 0 and not deadline.left:
            break
    return times


def load() -> float:
    return os.getloadavg()[0]
