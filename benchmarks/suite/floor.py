"""What the arithmetic alone must take: floating-point operations at the device's measured matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.suite.timing import seconds_of


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


ON_CPU: dict[Any, Any] = {  # torch counts the attention of graphics cards alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one run of `work`."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of a product of two large square matrices: the fastest of as many as fit into the time."""
    side = 8192 if device == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        fastest = min(fastest, seconds_of(lambda: torch.mm(one, other), device))
    return 2 * side**3 / fastest
