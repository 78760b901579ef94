"""A plain classifier of category, colour, place and style, which only the gates use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.metrics.masks import Block
from personalize_core.mini import world
from personalize_core.mini.autoencoder import scenes
from personalize_core.mini.degrade import degraded
from personalize_core.mini.names import COLOURS, STYLES
from personalize_core.mini.networks import Average, to_tensor
from personalize_core.mini.text import ASPECTS, IGNORED, Heads, labels, reading_loss, right


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 96, 128)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.blocks = nn.Sequential(*(Block(a, b, 2) for a, b in zip(widths, widths[1:], strict=False)))
        self.heads = Heads(widths[-1] * 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64), -1 to 1, to the scores of each aspect."""
        return self.heads(self.blocks(F.relu(self.stem(x))).flatten(1))


def truths(drawn: list[world.Scene]) -> dict[str, Tensor]:
    """What each image shows; colour is asked of one-coloured things outside sketches only."""
    found = labels(drawn, [world.caption(s) for s in drawn])
    seen = [s.design.layout == "plain" and s.style != STYLES[2] for s in drawn]
    colours = [list(COLOURS).index(s.design.colours[0]) if ok else IGNORED for s, ok in zip(drawn, seen, strict=True)]
    return found | {"colour": torch.tensor(colours)}


@torch.no_grad()
def verdicts(network: Network, images: np.ndarray) -> dict[str, Tensor]:
    """The most likely class of each aspect, (B,)."""
    device = next(network.parameters()).device
    parts = [network(to_tensor(images[n : n + 64]).to(device)) for n in range(0, len(images), 64)]
    return {aspect: torch.cat([p[aspect] for p in parts]).argmax(1).cpu() for aspect in ASPECTS}


class Classifier:
    name = "classifier"

    def __init__(self, seed: int = 0, batch: int = 48, lr: float = 1e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.network = Network().to(device)
        self.average = Average(self.network)
        self.modules = {"network": self.network, "average": self.average}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr, weight_decay=0.01, fused=True)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        images, _, drawn = scenes(rng, self.batch, plain=0.85)
        x = degraded(to_tensor(images), generator).to(self.device)
        return reading_loss(self.network(x), truths(drawn)), self.batch

    def after_step(self, number: int) -> None:
        self.average.update(self.network, number, longest=0.99)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        images, _, drawn = scenes(np.random.default_rng(99), 200, plain=1)
        found = right(self.average.module(to_tensor(images).to(self.device)), truths(drawn))
        return ", ".join(f"{aspect} {share:.3f}" for aspect, share in found.items())
