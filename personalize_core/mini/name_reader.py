"""Reads from an image what a name would say: the category, both colours, layout and mark. Only the gates use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.metrics.masks import Block
from personalize_core.mini import world
from personalize_core.mini.degrade import degraded
from personalize_core.mini.named import PARTS, Name, varied
from personalize_core.mini.names import CATEGORIES
from personalize_core.mini.networks import Average, to_tensor
from personalize_core.mini.text import IGNORED, reading_loss, right

READ = ("first colour", "second colour", "layout", "mark")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 96, 128)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.blocks = nn.Sequential(*(Block(a, b, 2) for a, b in zip(widths, widths[1:], strict=False)))
        classes = {"category": len(CATEGORIES)} | {part: len(PARTS[part]) for part in READ}
        self.heads = nn.ModuleDict({aspect: nn.Linear(widths[-1] * 16, count) for aspect, count in classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64), -1 to 1, to the scores of each aspect."""
        features = self.blocks(F.relu(self.stem(x))).flatten(1)
        return {aspect: head(features) for aspect, head in self.heads.items()}


def truths(rendered: list[world.Scene]) -> dict[str, Tensor]:
    """Each aspect's class numbers, (B,); a plain thing has no second colour."""
    rows = [Name(scene).rows() for scene in rendered]
    found = {part: torch.tensor([IGNORED if row[part] < 0 else row[part] for row in rows]) for part in READ}
    return found | {"category": torch.tensor([CATEGORIES.index(scene.category) for scene in rendered])}


def judged_scenes(rng: np.random.Generator, count: int) -> list[world.Scene]:
    """Renders of one thing, most of two colours, of any drawn variant that training may use."""
    rendered = [world.random_scene(rng, plain=0.15, photo=1) for _ in range(count)]
    return [replace(scene, design=varied(rng, scene)) for scene in rendered]


@torch.no_grad()
def verdicts(network: nn.Module, images: np.ndarray) -> dict[str, Tensor]:
    """The most likely class of each aspect, (B,), of (B, 64, 64, 3) uint8 images."""
    parts = [network(to_tensor(images[n : n + 64])) for n in range(0, len(images), 64)]
    return {aspect: torch.cat([part[aspect] for part in parts]).argmax(1) for aspect in parts[0]}


class NameReader:
    name = "name_reader"

    def __init__(self, seed: int = 3, batch: int = 32, lr: float = 1e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.network = Network().to(device)
        self.average = Average(self.network)
        self.modules = {"network": self.network, "average": self.average}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr, weight_decay=0.01, fused=True)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        rendered = judged_scenes(rng, self.batch)
        x = degraded(to_tensor(np.stack([world.draw(scene)[0] for scene in rendered])), generator).to(self.device)
        return reading_loss(self.network(x), truths(rendered)), self.batch

    def after_step(self, number: int) -> None:
        self.average.update(self.network, number, longest=0.99)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        rendered = judged_scenes(np.random.default_rng(99), 200)
        x = to_tensor(np.stack([world.draw(scene)[0] for scene in rendered])).to(self.device)
        found = right(self.average.module(x), truths(rendered))
        return ", ".join(f"{aspect} {share:.3f}" for aspect, share in found.items())
