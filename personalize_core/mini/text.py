"""Stage 2: the text encoder learns to say what a caption names, before the U-Net has to rely on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.mini import tokenizer, world
from personalize_core.mini.names import CATEGORIES, COLOURS, PLACES, STYLES
from personalize_core.mini.networks import TEXT_WIDTH, text_encoder

ASPECTS: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "colour": (*COLOURS, ""),
    "place": tuple(PLACES),
    "style": STYLES,
}
IGNORED = -100


def labels(scenes: list[world.Scene], captions: list[str]) -> dict[str, Tensor]:
    """What each caption says, as class numbers; two colours are no one colour, two things no one category."""
    rows: dict[str, list[int]] = {aspect: [] for aspect in ASPECTS}
    for scene, caption in zip(scenes, captions, strict=True):
        said = set(caption.split())
        rows["category"].append(IGNORED if scene.beside else CATEGORIES.index(scene.category))
        named = [c for c in COLOURS if c in said]
        known = IGNORED if " and " in caption or scene.beside else ASPECTS["colour"].index(named[0] if named else "")
        rows["colour"].append(known)
        place = scene.place if scene.place and PLACES[scene.place] in caption else ""
        rows["place"].append(ASPECTS["place"].index(place))
        rows["style"].append(STYLES.index(scene.style))
    return {aspect: torch.tensor(numbers) for aspect, numbers in rows.items()}


class Heads(nn.Module):
    """One linear reading per aspect of the text encoder's output at the end token."""

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({aspect: nn.Linear(width, len(classes)) for aspect, classes in ASPECTS.items()})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {aspect: linear(rows) for aspect, linear in self.linear.items()}


def tokens(words, captions: list[str], length: int = 77) -> Tensor:
    """(B, length) int64."""
    return words(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def at_end(hidden: Tensor, ids: Tensor, end: int) -> Tensor:
    """(B, width): the rows (B, 77, width) at the first end token."""
    return hidden[torch.arange(len(ids)), (ids == end).int().argmax(dim=1)]


def reading_loss(scores: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Summed over the aspects; nothing for one that no caption says."""
    total = torch.zeros((), device=next(iter(scores.values())).device)
    for aspect, score in scores.items():
        if bool((truth[aspect] != IGNORED).any()):
            total = total + F.cross_entropy(score, truth[aspect].to(score.device), ignore_index=IGNORED)
    return total


def right(scores: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The share of right answers per aspect."""
    found = {}
    for aspect, score in scores.items():
        keep = truth[aspect] != IGNORED
        found[aspect] = float((score.argmax(1).cpu() == truth[aspect])[keep].float().mean())
    return found


class Text:
    name = "text"

    def __init__(self, seed: int = 0, batch: int = 48, lr: float = 1e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.words = tokenizer.load()
        self.network = text_encoder(len(self.words), self.words.eos_token_id).to(device)
        self.heads = Heads().to(device)
        self.modules = {"network": self.network, "heads": self.heads}
        parameters = [*self.network.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    def read(self, scenes: list[world.Scene], captions: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ids = tokens(self.words, captions, 24).to(self.device)  # attention is causal: what follows the end is unread
        return self.heads(at_end(self.network(ids).last_hidden_state, ids, self.words.eos_token_id)), labels(
            scenes, captions
        )

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        scenes = [world.random_scene(rng) for _ in range(self.batch)]
        return reading_loss(*self.read(scenes, [world.caption(s, rng) for s in scenes])), self.batch

    def after_step(self, number: int) -> None:
        pass

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        rng = np.random.default_rng(99)
        scenes = [world.random_scene(rng) for _ in range(200)]
        found = right(*self.read(scenes, [world.caption(s, rng) for s in scenes]))
        return ", ".join(f"{aspect} {share:.3f}" for aspect, share in found.items())
