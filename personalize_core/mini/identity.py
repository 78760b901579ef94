"""The identity encoder: a ViT that learns by self-distillation that two images show the same thing.

As in DINO (Caron et al. 2021) and MoCo v3 (Chen et al. 2021), a student has to say of one view what its own moving
average, the teacher, says of another, and no label is used. The two views are two renders of one design on different
places in different poses, now and then one that the autoencoder has been over. What the teacher says is which thing it
sees, among all things of the batch and of the batches before (a memory, as in He et al. 2020). Two other answers were
tried. A head with 512 learned prototypes, balanced by Sinkhorn-Knopp as in DINOv2, stood after 86,400 views where this
stands after 12,800, and no longer rose; but the head, KoLeo and views drawn anew went with it, so the prototypes' own
share is not known. The teacher's likenesses between things (Fang et al. 2021, Tejankar et al. 2021), with which it
would say "partly this, partly that", collapsed within 100 steps.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from personalize_core.mini import loop, networks, world
from personalize_core.mini.degrade import degraded
from personalize_core.mini.names import VARIANTS
from personalize_core.mini.networks import Average, to_images, to_tensor

EACH = 4  # renders of a design, beside the one that the autoencoder goes over
TEMPERATURE = 0.07
SHIFT = 3  # pixels; a cached render is moved by up to so many before it is shown


def view(design: world.Design, rng: np.random.Generator) -> np.ndarray:
    """The design in a random photograph, (64, 64, 3) uint8."""
    return world.draw(replace(world.random_scene(rng, photo=1), design=design))[0]


def designs(rng: np.random.Generator, count: int, plain: float = 0.1) -> list[world.Design]:
    """Different from one another, on sprites that training may use."""
    sprites = [sprite for variants in VARIANTS.values() for sprite in variants]
    found: dict[world.Design, None] = {}
    while len(found) < count:
        found[world.random_design(rng, str(rng.choice(sprites)), plain)] = None
    return list(found)


@torch.no_grad()
def went_through(vae: AutoencoderKL, images: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """What the decoder makes of latents that are a little off, as generated ones are. (B, h, w, 3) uint8."""
    latents = vae.encode(to_tensor(images).to(vae.device)).latent_dist.mean
    level = 0.3 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return to_images(vae.decode(latents + (level * noise).to(vae.device)).sample)


def make_views(things: list[world.Design], rng: np.random.Generator, vae: AutoencoderKL, out: np.ndarray) -> None:
    """Fill (designs, EACH + 1, h, w, 3): drawing takes as long as a training step, so it is done once."""
    generator = torch.Generator().manual_seed(0)
    for number, thing in enumerate(things):
        for column in range(EACH + 1):
            out[number, column] = view(thing, rng)
        if (number + 1) % 1000 == 0:
            print(f"drew {number + 1} of {len(things)} designs", flush=True)
    for start in range(0, len(things), 50):
        rows = slice(start, start + 50)
        out[rows, EACH] = went_through(vae, np.ascontiguousarray(out[rows, EACH]), generator)


def views_of(work: Path, seed: int, count: int, vae: AutoencoderKL) -> np.ndarray:
    """The views of the designs of a seed, made once and kept: (count, EACH + 1, 64, 64, 3) uint8, read as needed."""
    path = work / f"identity_views_{seed}_{count}.npy"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        rng = np.random.default_rng([seed, 77])
        things = designs(rng, count)
        shape = (count, EACH + 1, world.SIZE, world.SIZE, 3)
        out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        make_views(things, rng, vae, out)
        out.flush()
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by up to SHIFT pixels, its edge repeated."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * SHIFT + 1, (len(images), 2))
    h, w = images.shape[1:3]
    return np.stack([one[y : y + h, x : x + w] for one, (y, x) in zip(padded, corners, strict=True)])


class Memory(nn.Module):
    """What the teacher said of the last things, first in, first out."""

    rows: Tensor
    owners: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, width))
        self.register_buffer("owners", torch.full((length,), -1))  # the thing's number; -1: nothing there yet

    @torch.no_grad()
    def add(self, rows: Tensor, owners: Tensor) -> None:
        length = len(self.rows)
        self.rows.copy_(torch.cat([self.rows, rows])[-length:])
        self.owners.copy_(torch.cat([self.owners, owners])[-length:])


def distillation(student: Tensor, teacher: Tensor, owners: Tensor, memory: Memory) -> Tensor:
    """Cross-entropy of the student's saying which thing it sees, where the teacher saw thing n in view n.

    Args:
        student: (B, width), rows of length 1, of one view of B different things.
        teacher: (B, width), rows of length 1, of another view of the same things in the same order.
        owners: (B,) int64, the things' numbers: a thing that is in the memory too is not held against itself.
    """
    known = torch.cat([teacher, memory.rows])
    numbers = torch.cat([owners, memory.owners])
    left_out = (numbers < 0)[None] | (numbers[None] == owners[:, None])
    left_out[:, : len(owners)] = False
    scores = (student @ known.T / TEMPERATURE).masked_fill(left_out, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(student), device=student.device))


def class_token(network: nn.Module, images: Tensor) -> Tensor:
    """(B, width), rows of length 1: the feature itself, with no head between it and the loss."""
    return F.normalize(network(images).last_hidden_state[:, 0], dim=1)


class Identity:
    name = "identity"

    def __init__(
        self,
        seed: int = 0,
        batch: int = 64,
        lr: float = 1e-3,
        device: str = "cpu",
        work: Path = loop.WORK,
        things: int = 6000,
        memory: int = 1024,
    ) -> None:
        self.seed, self.batch, self.device = seed, batch, device
        self.vae = AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).to(device).eval()  # type: ignore[union-attr]
        self.views = views_of(work, seed, things, self.vae)
        torch.manual_seed(seed)
        self.student = networks.identity().to(device)
        self.teacher = Average(self.student)
        self.memory = Memory(memory, self.student.config.hidden_size).to(device)
        self.modules = {"student": self.student, "teacher": self.teacher, "memory": self.memory}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr, weight_decay=0.02, fused=True)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        things = rng.choice(len(self.views), self.batch, replace=False)
        columns = np.stack([rng.choice(EACH + 1, 2, replace=False) for _ in things])
        images = np.concatenate([self.views[things, columns[:, side]] for side in (0, 1)])
        clean = to_tensor(shifted(images, rng))
        said = class_token(self.student, degraded(clean, generator).to(self.device))
        with torch.no_grad():
            seen = class_token(self.teacher.module, degraded(clean, generator).to(self.device))
        owners = torch.from_numpy(things).to(self.device)
        (one, other), (seen_one, seen_other) = said.chunk(2), seen.chunk(2)
        loss = distillation(one, seen_other, owners, self.memory) + distillation(other, seen_one, owners, self.memory)
        self.memory.add(seen_one, owners)
        return loss / 2, 2 * self.batch

    def after_step(self, number: int) -> None:
        self.teacher.update(self.student, number, longest=0.99)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        rng = np.random.default_rng(99)
        things = designs(rng, 100, plain=0)
        first, second = (np.stack([view(d, rng) for d in things]) for _ in range(2))
        again = went_through(self.vae, second, torch.Generator().manual_seed(0))
        known, clean, poor = (
            class_token(self.teacher.module, to_tensor(p).to(self.device)) for p in (first, second, again)
        )
        right = torch.arange(100, device=self.device)
        found, found_poor = (float(((v @ known.T).argmax(1) == right).float().mean()) for v in (clean, poor))
        return f"the same design found among 100: {found:.2f}, from the autoencoder {found_poor:.2f}"
