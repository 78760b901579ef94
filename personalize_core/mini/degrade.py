"""What generated and reconstructed images suffer, for the networks that must judge them: blur, noise, tint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def degraded(x: Tensor, generator: torch.Generator) -> Tensor:
    """About two images in three of (B, 3, h, w), -1 to 1, made softer, noisier or off in tone."""
    rows = (len(x), 1, 1, 1)
    share = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < 0.6)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softer = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x * (1 - share) + softer * share
    level = 0.12 * torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < 0.5)
    coarse = torch.randn(len(x), 3, x.shape[2] // 4, x.shape[3] // 4, generator=generator)
    blotches = F.interpolate(coarse, size=x.shape[2:], mode="bilinear")
    x = x + level * (blotches + 0.5 * torch.randn(x.shape, generator=generator))
    tint = 0.06 * torch.randn(len(x), 3, 1, 1, generator=generator)
    return (x * (1 + 0.1 * torch.randn(rows, generator=generator)) + tint).clamp(-1, 1)
