"""Stage 3e: things in more outlines. The U-Net goes on alone, and the text encoder stays as it is.

The U-Net knew one drawing of most categories. A concept, which is another drawing, was then often nearer to another
category's outline than to its own, and Textual Inversion went there: a robot came out as a teapot. Here half of the
scenes show further drawings of their categories, most of them bent, under the captions that the other stages have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize_core.mini import loop, world
from personalize_core.mini.diffusion import DROPPED, SMALL, Adapted, cached_scene, held_out
from personalize_core.mini.named import reserved, varied
from personalize_core.mini.text import tokens

ODDS = {"plain": 0.4, "photo": 0.85, "studio": 0.2}  # of the scenes with further drawings
PAIRS = 0.15  # share of those that show two things


def scene_of(seed: int, number: int) -> world.Scene:
    """A cached scene: of even numbers with further drawings, of odd ones as in the stages before."""
    if number % 2:
        return cached_scene(seed, number)
    rng = np.random.default_rng([seed, 10, number])
    while True:
        scene = (world.random_pair if rng.random() < PAIRS else world.random_scene)(rng, **ODDS)
        if scene.beside is None and rng.random() < SMALL:
            scene = replace(scene, pose=world.half_as_wide(rng, rng.uniform(0.26, 0.74)))
        beside = scene.beside and replace(scene.beside, design=varied(rng, scene.beside))
        scene = replace(scene, design=varied(rng, scene), beside=beside)
        plain = [thing for thing in scene.things if thing.design.layout == "plain"]
        kept = any(held_out(thing.category, thing.design.colours[0], scene.place) for thing in plain)
        if not kept and not any(reserved(thing.category, thing.design) for thing in scene.things):
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
