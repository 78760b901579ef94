"""A snapshot of a workspace: within it every question is answered once, and nothing outlives it.

A plan reads the same concept images, sources and weights for every concept and method. Between two plans any of them
may change, so nothing is kept; within one, all answers are of the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_found: ContextVar[dict[Hashable, Any] | None] = ContextVar("found", default=None)


@contextmanager
def snapshot() -> Iterator[None]:
    """Within it, `memoized` functions keep their results; each snapshot starts with none. Also a decorator."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def memoized(function: Callable[P, T]) -> Callable[P, T]:
    """Calls the function once for the same arguments within a snapshot, and every time outside of one.

    Args:
        function: of hashable arguments, that writes nothing; what it raises is not kept, and nobody changes what it
            returns.
    """

    @wraps(function)
    def ask(*args: P.args, **kwargs: P.kwargs) -> T:
        found = _found.get()
        if found is None:
            return function(*args, **kwargs)
        question = (function, args, tuple(sorted(kwargs.items())))
        if question not in found:
            found[question] = function(*args, **kwargs)
        return found[question]

    return ask
