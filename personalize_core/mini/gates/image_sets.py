"""Images that several gates look at, and how they are laid out to be looked at."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from personalize_core.mini import concepts, world
from personalize_core.mini.networks import to_images, to_tensor


def concept_images() -> np.ndarray:
    """Every concept image of the eight concepts, (N, 64, 64, 3)."""
    rendered = [
        world.draw(concepts.scene(name, place, number))[0]
        for name in concepts.DESIGNS
        for number, place in enumerate(concepts.PLACES[name])
    ]
    return np.stack(rendered)


def reconstructed(vae, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [vae(to_tensor(images[n : n + 32])).sample for n in range(0, len(images), 32)]
    return to_images(torch.cat(parts))


def tiled(images: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """(N, h, w, 3) in rows; what is missing of the last row stays white."""
    missing = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    images = np.concatenate([images, missing])
    rows = [np.concatenate(list(images[n : n + columns]), 1) for n in range(0, len(images), columns)]
    grid = Image.fromarray(np.concatenate(rows))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
