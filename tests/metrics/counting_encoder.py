"""An encoder and a segmenter without weights, which remember how many images they have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize_core.metrics.features import Encoders


@dataclass(frozen=True)
class Counting:
    """The mean and the spread of each colour, which depend on no other image."""

    name: str = "counting"
    weights_hash: str = "0" * 64
    preprocessing: str = "none"
    device: str = "cpu"
    asked: list[int] = field(default_factory=list)
    looks_for = None

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        self.asked.append(len(images))
        pixels = [np.asarray(image, dtype=np.float64) for image in images]
        return torch.tensor([[*one.mean((0, 1)), *one.std((0, 1)), 1.0] for one in pixels], dtype=torch.float32)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 7)


@dataclass(frozen=True)
class Bright:
    """It takes what is not dark for the concept, whatever that is."""

    name: str = "bright"
    weights_hash: str = "1" * 64
    preprocessing: str = "none"

    def masks(self, images: Sequence[Image.Image], class_noun: str) -> list[np.ndarray]:
        return [np.asarray(image).max(axis=2) > 100 for image in images]


def made(**changes: Any) -> Encoders:
    """Encoders that have seen nothing yet."""
    return Encoders([Counting(**changes)], [Counting(name="other")], Bright())


ENCODERS = made()
