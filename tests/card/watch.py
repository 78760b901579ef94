"""What is counted of a pretended card's work: memory, waits of the host, copies, FLOPs."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 512  # bytes: CUDA's caching allocator hands out multiples of it
PACKAGES = ("/personalize_core/", "/diffusers/", "/transformers/", "/torch/optim/", "/torch/nn/")


@dataclass
class Counts:
    """What happened between two moments. The lines are those of personalize_core that asked."""

    waits: Counter[str] = field(default_factory=Counter)  # operation and line -> how often the host waited for a result
    copies: Counter[str] = field(default_factory=Counter)  # direction and line -> copies between host and card
    blocking: int = 0  # of the copies, those for which the host waits too
    flops: Counter[str] = field(default_factory=Counter)  # type ("bfloat16") -> operations of matrices and convolutions
    calls: int = 0  # operations of torch that the host launched


@dataclass(frozen=True)
class Peak:
    """The most that was live at once."""

    size: int = 0  # bytes
    by_line: Counter[str] = field(default_factory=Counter)  # line that made it -> bytes, where `Watch.by_line` is set


class Watch:
    """Counts what the tensors of the pretended card do. There is one, as there is one card."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.live = 0  # bytes of all storages on the card
        self.peak = Peak()  # since `restart`, or `restart_peak`
        self.by_line = False  # remember which line made each tensor? It takes time
        self._sizes: dict[int, int] = {}
        self._lines: dict[int, str] = {}
        self._live_by_line: Counter[str] = Counter()

    def restart(self) -> None:
        """Count from here on; the peak is what is live now."""
        gc.collect()
        self.counts = Counts()
        self.restart_peak()

    def restart_peak(self) -> None:
        """Look for a new peak, and count on."""
        self.peak = Peak(self.live, Counter(self._live_by_line))

    def hold(self, inner: Tensor) -> None:
        """A tensor with this inside lies on the card; its storage counts once, until it is freed."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += size
        if self.by_line:
            self._lines[key] = f"{line()} <- {library_line()}"
            self._live_by_line[self._lines[key]] += size
        if self.live > self.peak.size:
            self.restart_peak()
        weakref.finalize(storage, self._free, key).atexit = False

    def wait(self, operation: str) -> None:
        self.counts.waits[f"{operation} at {line()}"] += 1

    def copy(self, direction: str, blocking: bool) -> None:
        self.counts.copies[f"{direction} at {line()}"] += 1
        self.counts.blocking += blocking

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        if key in self._lines:
            self._live_by_line[self._lines.pop(key)] -= size


WATCH = Watch()


def line() -> str:
    """The innermost line of personalize_core that is running, as "training/loop.py:90 _train_step"."""
    return _innermost(PACKAGES[0]) or "no line of personalize_core"


def library_line() -> str:
    """The innermost line of diffusers or transformers, or else of torch, that is running."""
    return next((found for package in PACKAGES[1:] if (found := _innermost(package))), "no library")


def _innermost(package: str) -> str:
    frame = sys._getframe(2)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition(package)
        if found:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
