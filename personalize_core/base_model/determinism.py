"""The same bits from one run to the next on a GPU too, at the price of slower kernels."""

from __future__ import annotations

import os

# cuBLAS adds up in the same order only with a workspace of fixed size, which it reads once, before its first product:
# https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def set_deterministic(on: bool) -> None:
    """Choose torch's kernels for this process: deterministic ones, or the fastest.

    With `on`, the backward pass of attention and cuDNN's weight gradients add up in a fixed order, and torch raises
    RuntimeError where an operation has no deterministic kernel. On a CPU the results are the same bits either way.
    """
    import torch

    if on:
        os.environ.setdefault(WORKSPACE, FIXED)
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False  # a benchmark chooses kernels by how fast they were in this process
