"""Stage 3c: names that say what phrases say. The text encoder learns them alone, and the U-Net stays as it is.

Of "a photo of a NAME on the beach" the text encoder is to give the U-Net the rows that it gave of "a photo of a teal
and orange backpack on the beach". The name stands where the noun stood; the rows of the words that the caption no
longer has go to the last places of the padding. Cross-attention asks for no order, so the U-Net draws the name as it
draws the phrase, and no image is needed to train the text encoder.

Between two names the embeddings mix, and so do the rows that the mixture is to be read as. Else the text encoder reads
every embedding as the nearest word: from a noun to a name the U-Net's loss then stays level up to half of the way and
falls at once, and Textual Inversion, which starts at the noun, finds no slope that leads to a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel

from personalize_core.mini import tokenizer, world
from personalize_core.mini.diffusion import DROPPED
from personalize_core.mini.named import (
    ALONE,
    BEFORE_NOUN,
    Composer,
    Name,
    Speaker,
    hidden_states,
    judged_names,
    reserved,
    word_id,
)
from personalize_core.mini.networks import TEXT_WIDTH, Average, text_encoder
from personalize_core.mini.text import tokens

ODDS = {"plain": 0.3, "photo": 0.85, "studio": 0.2}
PAIRS = 0.2
SILENT = 0.25  # share of things of whose colours nothing is said, so that "a photo of a dog" stays what it was
MIXED = 0.7  # share of captions whose names are mixed with others
NOISE = 0.05  # at most, standard deviation of what is added to each number of a name; a word's own is 0.1
NOUN_ALONE = 0.6  # share of those where the others are the nouns alone
SAID = frozenset({"first colour", "second colour"})  # what a phrase says of a thing, besides its category


@dataclass(frozen=True)
class Told:
    """A caption with names, and the rows of the same caption's phrases that it is to be read as."""

    ids: list[int]  # (L,), the rare word in the place of each name
    rows: list[int]  # (L,), each once: where the row that is to stand there stands in the phrases' caption
    names: list[Name]
    missing: list[bool]  # (L,), where words that the caption no longer has are to be read
    phrased: list[int]  # (L,), the phrases' caption


def random_scene(rng: np.random.Generator) -> world.Scene:
    while True:
        scene = (world.random_pair if rng.random() < PAIRS else world.random_scene)(rng, **ODDS)
        if not any(reserved(thing.category, thing.design) for thing in scene.things):
            return scene


def other_things(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The same place with things of other designs, half of them of other categories."""
    while True:
        drawn = [world.random_scene(rng, plain=ODDS["plain"]) for _ in scene.things]
        first, *rest = (
            replace(thing, category=(thing if rng.random() < 0.5 else new).category, design=new.design)
            for thing, new in zip(scene.things, drawn, strict=True)
        )
        found = replace(scene, category=first.category, design=first.design, beside=rest[0] if rest else None)
        if not any(reserved(thing.category, thing.design) for thing in found.things):
            return found


def phrases_of(scene: world.Scene, rng: np.random.Generator) -> list[str]:
    """What a caption says of each thing: its colours, now and then left out, and its category."""
    return [
        thing.category if rng.random() < SILENT else f"{world.colour_words(thing.design)} {thing.category}"
        for thing in scene.things
    ]


def told(ids: Sequence[int], scene: world.Scene, phrases: Sequence[str], words, rng: np.random.Generator) -> Told:
    """The caption of these ids, (L,), with names in the place of some of its phrases.

    The n-th thing's missing words, three at most, go to places L - 3 n to L - 3 n + 2; the padding that was there
    follows the end, so that no row is lost.
    """
    rare, length, left = word_id(words, tokenizer.RARE_TOKEN), len(ids), 0
    shown, rows, names = [], [], []
    moved: dict[int, int] = {}  # place -> the row that goes there
    for number, (thing, said_of_it) in enumerate(zip(scene.things, phrases, strict=True), 1):
        phrase = [word_id(words, word) for word in said_of_it.split()]
        parts = SAID if len(phrase) > 1 else frozenset()
        start = find(ids, phrase, left)
        last = start + len(phrase) - 1
        draw = rng.random()
        if draw < ALONE:
            names.append(Name(thing, parts=parts))
            kept, said = [last], [rare]
        elif draw < ALONE + BEFORE_NOUN and parts:
            names.append(Name(thing, category=bool(rng.random() < 0.5), parts=parts))
            kept, said = [last - 1, last], [rare, ids[last]]
        else:
            kept, said = list(range(start, last + 1)), list(ids[start : last + 1])
        rows += [*range(left, start), *kept]
        shown += [*ids[left:start], *said]
        gone = range(start, kept[0])
        moved |= dict(zip(range(length - 3 * number, length), gone, strict=False))
        left = last + 1
    end = find(ids, [words.eos_token_id], left)
    rows += [*range(left, end + 1), *moved]
    shown += ids[left : end + 1]
    rows += [moved.get(place, place) for place in range(len(rows), length)]
    missing = [place in moved for place in range(length)]
    return Told(shown + [words.eos_token_id] * (length - len(shown)), rows, names, missing, list(ids))


def unnamed(ids: Sequence[int]) -> Told:
    """The caption as it is."""
    return Told(list(ids), list(range(len(ids))), [], [False] * len(ids), list(ids))


def find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """Where `part` next begins within the ids."""
    return next(n for n in range(start, len(ids)) if list(ids[n : n + len(part)]) == list(part))


class Phrased:
    name = "phrased"

    def __init__(self, seed: int = 4, batch: int = 32, lr: float = 5e-4, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.words = tokenizer.load()
        base = Path(__file__).parent / "weights" / "base" / "text_encoder"
        self.teacher: Any = CLIPTextModel.from_pretrained(base, use_safetensors=True, dtype=torch.float32)
        self.teacher.to(device).requires_grad_(False).eval()
        self.text = text_encoder(len(self.words), self.words.eos_token_id).to(device)
        self.text.load_state_dict(self.teacher.state_dict())
        self.composer = Composer().to(device)
        self.composer.start_from(self.words, self.text.get_input_embeddings().weight)
        self.speaker = Speaker(self.words, self.text, self.composer)
        self.text_average, self.composer_average = Average(self.text), Average(self.composer)
        self.modules = {
            "text": self.text,
            "composer": self.composer,
            "text_average": self.text_average,
            "composer_average": self.composer_average,
        }
        groups = [{"params": [*self.text.parameters()]}, {"params": [*self.composer.parameters()], "lr": 6 * lr}]
        self.optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        scenes = [random_scene(rng) for _ in range(self.batch)]
        others = [other_things(scene, rng) for scene in scenes]
        phrases = [phrases_of(scene, rng) for scene in scenes]
        nouns = rng.random(self.batch) < NOUN_ALONE
        of_others = [
            [thing.category for thing in scene.things] if noun else phrases_of(other, rng)
            for scene, other, noun in zip(scenes, others, nouns, strict=True)
        ]
        shown, seeds = rng.random(self.batch) >= DROPPED, rng.integers(2**31, size=self.batch)
        made = self.told(scenes, phrases, shown, seeds)
        mixed_with = self.told(others, of_others, shown, seeds)
        shares = rng.random(self.batch) * (rng.random(self.batch) < MIXED)
        read_as = np.where(nouns, 1 - np.sqrt(1 - shares), shares)
        return self.error(made, self.speaker, rng, mixed_with, shares, read_as), self.batch

    def told(
        self, scenes: list[world.Scene], phrases: list[list[str]], shown: Sequence[bool], seeds: Sequence[int]
    ) -> list[Told]:
        """What is told of captions of the scenes, made with the choices of these seeds; of empty ones, if not shown."""
        choices = [np.random.default_rng(seed) for seed in seeds]
        captions = [world.caption(*one) for one in zip(scenes, choices, phrases, strict=True)]
        ids = tokens(self.words, [caption if show else "" for caption, show in zip(captions, shown, strict=True)])
        return [
            told(row, scene, said, self.words, choice) if show else unnamed(row)
            for row, scene, said, show, choice in zip(ids.tolist(), scenes, phrases, shown, choices, strict=True)
        ]

    def error(
        self,
        made: list[Told],
        speaker: Speaker,
        rng: np.random.Generator,
        mixed_with: list[Told] | None = None,
        shares: Sequence[float] = (),
        read_as: Sequence[float] = (),
    ) -> Tensor:
        """Mean squared, of what is read of the names' captions; words, missing words and padding count alike.

        Args:
            mixed_with: as many captions. Where both have their names in the same words, names and targets are mixed.
            shares: of the other caption's names in each mixture, 0 to 1.
            read_as: of the other caption's target.
        """
        target, vectors = self.target(made), self.vectors(made, speaker)
        if mixed_with is not None:
            alike = [one.ids == other.ids for one, other in zip(made, mixed_with, strict=True)]
            mixed_with = [other if same else one for one, other, same in zip(made, mixed_with, alike, strict=True)]
            share, of_target = (torch.tensor(of, dtype=torch.float32, device=self.device) for of in (shares, read_as))
            target = target.lerp(self.target(mixed_with), of_target[:, None, None])
            of_name = share.repeat_interleave(torch.tensor([len(one.names) for one in made], device=self.device))
            vectors = vectors.lerp(self.vectors(mixed_with, speaker), of_name[:, None])
        noise = rng.standard_normal(vectors.shape) * rng.uniform(0, NOISE, (len(vectors), 1))
        vectors = vectors + torch.from_numpy(noise).float().to(self.device)
        said = torch.tensor([one.ids for one in made], device=self.device)
        read = hidden_states(speaker.text_encoder, said, speaker.rare, vectors)
        error = ((read - target) ** 2).mean(dim=2)
        padding = (said == self.words.eos_token_id).cumsum(dim=1) > 1
        missing = [one.missing for one in made] + [one.missing for one in mixed_with or made]
        holes = torch.tensor(missing, device=self.device).unflatten(0, (2, -1)).any(dim=0)
        kinds = holes, ~padding, padding
        return sum((error[kind].mean() for kind in kinds if bool(kind.any())), torch.zeros(())) / len(kinds)

    @torch.no_grad()
    def target(self, made: list[Told]) -> Tensor:
        """What the weights that ship say of the phrases' captions, each row where it is to stand, (B, 77, D)."""
        ids, rows = (torch.tensor([getattr(one, of) for one in made], device=self.device) for of in ("phrased", "rows"))
        read = self.teacher(ids).last_hidden_state
        return read.gather(1, rows[..., None].expand(-1, -1, read.shape[-1]))

    def vectors(self, made: list[Told], speaker: Speaker) -> Tensor:
        """Of the captions' names, (N, D), in the order of reading."""
        names = [name for one in made for name in one.names]
        return speaker.vectors(names) if names else torch.empty(0, TEXT_WIDTH, device=self.device)

    def after_step(self, number: int) -> None:
        self.text_average.update(self.text, number, longest=0.995)
        self.composer_average.update(self.composer, number, longest=0.995)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        """The same error on fresh captions with names of designs that training never saw, and on captions without."""
        rng = np.random.default_rng(99)
        speaker = Speaker(self.words, self.text_average.module, self.composer_average.module)  # type: ignore[arg-type]
        scenes = judged_names(64)
        named = self.told(
            scenes, [phrases_of(scene, rng) for scene in scenes], [True] * 64, rng.integers(2**31, size=64)
        )
        plain = [unnamed(one.phrased) for one in named]
        errors = [self.error(made, speaker, rng) for made in (named, plain)]
        return "error with names {:.5f}, without {:.5f}".format(*errors)
