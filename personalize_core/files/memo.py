"""One look over a workspace: what was found out once is not found out again, and nothing outlives the look.

A plan asks for the same concept images, sources and weights for every concept and method. Between two looks any of them
may be another, so nothing is kept; within one, all answers are of the same moment.
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
def one_look() -> Iterator[None]:
    """Within it, `found_once` keeps answers; each look starts with none. Also a decorator of a function that looks."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def found_once(function: Callable[P, T]) -> Callable[P, T]:
    """Asks the function once for the same arguments within one look, and every time outside.

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
