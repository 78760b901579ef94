"""What the shape of an operation's result can depend on, as something that can be looked up."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor


@cache
def aliases(func: Any) -> bool:
    """Does an operation write to an argument, or return memory of one?"""
    schema = func._schema
    return any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))


def described(x: Any) -> Any:
    """A tensor's shape, strides and type, and where it lies; of a list or tuple those of all in it; else the value."""
    if isinstance(x, Tensor):
        return getattr(x, "description", None) or (Tensor, tuple(x.shape), x.stride(), x.dtype, x.device)
    if isinstance(x, (list, tuple)):
        return (type(x), *(described(one) for one in x))
    if isinstance(x, dict):
        return (dict, *((name, described(one)) for name, one in x.items()))
    return type(x), x  # 1, 1.0 and True are equal
