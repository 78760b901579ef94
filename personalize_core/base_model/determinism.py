"""The same bits from one run to the next on a GPU too, and full float32, at the price of slower kernels."""

from __future__ import annotations

import os

# cuBLAS adds up in the same order only with a workspace of fixed size, which it reads once, before its first product:
# https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def set_deterministic(on: bool) -> None:
    """Choose torch's kernels for this process: deterministic ones, or the fastest.

    With `on`, the backward pass of attention and cuDNN's weight gradients add up in a fixed order, and torch raises
    RuntimeError where an operation has no deterministic kernel. Without it, products and convolutions of float32 on a
    GPU read their factors as TF32, with 10 bits of mantissa, and sum in float32: since Ampere that is several times as
    fast. On a CPU the results are the same bits either way.
    """
    import torch

    if on:
        os.environ.setdefault(WORKSPACE, FIXED)
    torch.use_deterministic_algorithms(on)
    # Not torch.set_float32_matmul_precision, which changes a CPU's products too; where the newer fp32_precision is set,
    # torch refuses to tell other libraries the precision by any other name.
    torch.backends.cuda.matmul.allow_tf32 = not on
    torch.backends.cudnn.allow_tf32 = not on
    torch.backends.cudnn.benchmark = False  # a benchmark chooses kernels by how fast they were in this process
