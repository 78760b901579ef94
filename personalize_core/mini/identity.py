"""The identity encoder: a ViT that learns by self-distillation that two pictures show the same thing.

As DINO (Caron et al. 2021), a student predicts what its own moving average says of another view of the same thing,
in a set of learned prototypes, and no label is used; the two views are two renders of one design on different places
in different poses. The teacher's answers are balanced by Sinkhorn-Knopp and features are spread apart (KoLeo), both
as in DINOv2 (Oquab et al. 2023), since centring alone needs larger batches than ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.mini import networks, world
from personalize_core.mini.degrade import degraded
from personalize_core.mini.names import CATEGORIES, VARIANTS
from personalize_core.mini.networks import Average, to_tensor


def view(design: world.Design, rng: np.random.Generator) -> np.ndarray:
    """The design in a random photograph, (64, 64, 3) uint8."""
    scene = world.random_scene(rng, photo=1)
    from dataclasses import replace

    return world.draw(replace(scene, design=design))[0]


def designs(rng: np.random.Generator, count: int, plain: float = 0.25) -> list[world.Design]:
    sprites = [str(rng.choice(VARIANTS[str(rng.choice(CATEGORIES))])) for _ in range(count)]
    return [world.random_design(rng, sprite, plain) for sprite in sprites]


class Head(nn.Module):
    def __init__(self, width: int = 128, prototypes: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to cosines with the prototypes, (B, prototypes)."""
        return F.normalize(self.layers(x), dim=1) @ F.normalize(self.prototypes.weight, dim=1).T


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = networks.identity()
        self.head = Head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token = self.vit(x).last_hidden_state[:, 0]
        return token, self.head(token)


@torch.no_grad()
def balanced(scores: Tensor, temperature: float = 0.05, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp: (B, K) probabilities in which all prototypes are used alike."""
    q = torch.exp((scores - scores.max()) / temperature)
    for _ in range(rounds):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def spread(x: Tensor) -> Tensor:
    """KoLeo: minus the mean log distance of each row to its nearest."""
    x = F.normalize(x, dim=1)
    similarity = x @ x.T - 2 * torch.eye(len(x), device=x.device)
    nearest = x[similarity.argmax(dim=1)]
    return -torch.log((x - nearest).norm(dim=1) + 1e-4).mean()


class Identity:
    name = "identity"

    def __init__(self, seed: int = 0, batch: int = 48, lr: float = 1e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.student = Student().to(device)
        self.teacher = Average(self.student)
        self.modules = {"student": self.student, "teacher": self.teacher}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr, weight_decay=0.02, fused=True)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        things = designs(rng, self.batch)
        views = np.stack([view(d, rng) for _ in range(2) for d in things])
        clean = to_tensor(views)
        tokens, scores = self.student(degraded(clean, generator).to(self.device))
        with torch.no_grad():
            _, targets = self.teacher.module(degraded(clean, generator).to(self.device))
        first, second = (balanced(part) for part in targets.chunk(2))
        said_first, said_second = (part / 0.1 for part in scores.chunk(2))
        distillation = (
            -(second * said_first.log_softmax(1)).sum(1).mean() - (first * said_second.log_softmax(1)).sum(1).mean()
        )
        apart = sum(spread(part) for part in tokens.chunk(2))
        return distillation / 2 + 0.1 * apart / 2, 2 * self.batch

    def after_step(self, number: int) -> None:
        self.teacher.update(self.student, number, longest=0.99)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        rng = np.random.default_rng(99)
        things = designs(rng, 100, plain=0)
        views = to_tensor(np.stack([view(d, rng) for _ in range(2) for d in things])).to(self.device)
        a, b = F.normalize(self.teacher.module(views)[0], dim=1).chunk(2)
        found = (a @ b.T).argmax(1).cpu() == torch.arange(100)
        same = float((a * b).sum(1).mean())
        return f"the same design found among 100: {float(found.float().mean()):.2f}, similarity {same:.2f}"
