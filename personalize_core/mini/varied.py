"""Stage 3e: things in more outlines. The U-Net goes on alone, and the text encoder stays as it is.

The U-Net knew one drawing of most categories. A concept, which is another drawing, was then often nearer to another
category's outline than to its own, and Textual Inversion went there: a robot came out as a teapot. Here half of the
scenes show further drawings of their categories, most of them bent, under the captions that the other stages have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize_core.mini import loop, world
from personalize_core.mini.diffusion import DROPPED, Adapted, cached_scene
from personalize_core.mini.named import may_be_trained_on, nameable_scene
from personalize_core.mini.text import tokens

ODDS = {"plain": 0.4, "photo": 0.85, "studio": 0.2}  # of the scenes with further drawings


def scene_of(seed: int, number: int) -> world.Scene:
    """A cached scene: of even numbers with further drawings, of odd ones as in the stages before."""
    if number % 2:
        return cached_scene(seed, number)
    rng = np.random.default_rng([seed, 10, number])
    while True:
        scene = nameable_scene(rng, ODDS)
        if may_be_trained_on(scene):
            return scene


class Varied(Adapted):
    name = "varied"
    scene = staticmethod(scene_of)

    def __init__(
        self, seed: int = 5, lr: float = 6e-4, scenes: int = 16_000, work: Path = loop.WORK, **options: Any
    ) -> None:
        super().__init__(seed, lr, scenes, work, **options)
        self.text.requires_grad_(False)
        self.heads.requires_grad_(False)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)

    def read(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        captions = [world.caption(self.scene(self.seed, int(n)), rng) for n in rows]
        shown = ["" if rng.random() < DROPPED else caption for caption in captions]
        with torch.no_grad():
            context = self.text(tokens(self.words, shown).to(self.device)).last_hidden_state
        return context, context.new_zeros(())
