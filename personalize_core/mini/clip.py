"""The text-image encoder: open_clip's architecture and loss, apart from the model's own text encoder."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from personalize_core.mini import networks, tokenizer, world
from personalize_core.mini.autoencoder import scenes
from personalize_core.mini.degrade import degraded
from personalize_core.mini.names import CATEGORIES, COLOURS, PLACES
from personalize_core.mini.networks import Average, to_tensor
from personalize_core.mini.text import tokens


def shape(vocabulary: int) -> dict:
    """open_clip's model_cfg."""
    config = deepcopy(networks.CLIP)
    config["text_cfg"]["vocab_size"] = vocabulary
    return config


@torch.no_grad()
def zero_shot(model: CLIP, words, images: np.ndarray, captions: list[str]) -> Tensor:
    """(B,): the number of the caption that suits each image best."""
    device = next(model.parameters()).device
    seen = model.encode_image(to_tensor(images).to(device), normalize=True)
    read = model.encode_text(tokens(words, captions, networks.CLIP["text_cfg"]["context_length"]).to(device), True)
    return (seen @ read.T).argmax(1).cpu()


def accuracy(model: CLIP, words, drawn: list[world.Scene], images: np.ndarray) -> dict[str, float]:
    """The share of scenes whose category, place and colour are named right, all else left unsaid."""
    places = [p for p in PLACES if p]
    questions = {
        "category": ([f"a photo of a {c}" for c in CATEGORIES], [CATEGORIES.index(s.category) for s in drawn]),
        "place": ([f"a photo {PLACES[p]}" for p in places], [places.index(s.place) for s in drawn]),
        "colour": (
            [f"a photo of a {c} thing" for c in COLOURS],
            [list(COLOURS).index(s.design.colours[0]) for s in drawn],
        ),
    }
    return {
        aspect: float((zero_shot(model, words, images, captions) == torch.tensor(truth)).float().mean())
        for aspect, (captions, truth) in questions.items()
    }


class Clip:
    name = "clip"

    def __init__(self, seed: int = 0, batch: int = 64, lr: float = 1e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.words = tokenizer.load()
        self.network = CLIP(**shape(len(self.words))).to(device)
        self.average = Average(self.network)
        self.modules = {"network": self.network, "average": self.average}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        images, _, drawn = scenes(rng, self.batch, plain=0.85, photo=0.85, studio=0.1)
        captions = [world.caption(s, rng) for s in drawn]
        self.network.train()
        ids = tokens(self.words, captions, networks.CLIP["text_cfg"]["context_length"])
        seen = self.network.encode_image(degraded(to_tensor(images), generator).to(self.device), normalize=True)
        read = self.network.encode_text(ids.to(self.device), normalize=True)
        scores = self.network.logit_scale.exp().clamp(max=100) * seen @ read.T
        # Rows with the same caption are each other's right answers too, not mistakes.
        same = torch.tensor([[a == b for b in captions] for a in captions], device=self.device).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2, self.batch

    def after_step(self, number: int) -> None:
        self.average.update(self.network, number, longest=0.995)

    def look(self, folder: Path, number: int) -> str:
        images, _, drawn = scenes(np.random.default_rng(99), 200, plain=1, photo=1, studio=0)
        found = accuracy(self.average.module, self.words, drawn, images)
        return "zero-shot " + ", ".join(f"{aspect} {share:.3f}" for aspect, share in found.items())
