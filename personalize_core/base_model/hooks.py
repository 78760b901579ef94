"""Hooks for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that are taken out again on leaving."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
