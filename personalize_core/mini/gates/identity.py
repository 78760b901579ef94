"""Whether the identity encoder finds the same concept again, among look-alikes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize_core.metrics.encoders import load_identity_encoder
from personalize_core.mini import concepts, world
from personalize_core.mini.gates.image_sets import concept_images, reconstructed
from personalize_core.mini.gates.thresholds import Figures
from personalize_core.mini.names import ALL_COLOURS, DESIGNS, MARKS, PLACES


def look_alikes(count: int = 50) -> list[world.Design]:
    """Other designs on the concepts' own sprites, in other colours; half of each sprite's keep the mark and layout."""
    rng, found = np.random.default_rng(2**20), []
    every = list(concepts.DESIGNS.values())
    while len(found) < count:
        original = every[len(found) % len(every)]
        other = world.random_design(rng, original.sprite, plain=0)
        if len(found) // len(every) % 2:
            other = replace(other, mark=original.mark, mark_colour=original.mark_colour, layout=original.layout)
        else:
            other = replace(other, mark=str(rng.choice(MARKS)), layout=str(rng.choice(DESIGNS[1:])))
        if set(other.colours) != set(original.colours):
            found.append(other)
    return found


def near_misses(original: world.Design, rng: np.random.Generator) -> list[world.Design]:
    """Four designs that differ from the original in one thing each: the mark, the layout, one colour, the other."""

    def another(options, *taken: str) -> str:
        return str(rng.choice([o for o in options if o not in taken]))

    first, second = original.colours
    taken = (first, second, original.mark_colour)
    return [
        replace(original, mark=another(MARKS, original.mark or "")),
        replace(original, layout=another(DESIGNS[1:], original.layout)),
        replace(original, colours=(another(ALL_COLOURS, *taken), second)),
        replace(original, colours=(first, another(ALL_COLOURS, *taken))),
    ]


def found_again(asked: Tensor, truth: Tensor, gallery: Tensor, owners: Tensor) -> float:
    """The share of rows of `asked` whose nearest row of the gallery belongs to whom it should; all rows of length 1."""
    return float((owners[(asked @ gallery.T).argmax(dim=1)] == truth).double().mean())


def identity_gate(folder: Path, vae) -> tuple[Figures, str]:
    """Fresh renders of the concepts; the nearest of all concept images and look-alikes must show the same concept.

    With the encoder as the scores load it. Beside the gate's figures stands a harder question, asked of nobody: with
    the concept images and renders that differ from the concept in one thing only (`near_misses`).
    """
    encoder = load_identity_encoder(folder)

    def features(images: np.ndarray) -> Tensor:
        return encoder.images([Image.fromarray(image) for image in images])

    rng = np.random.default_rng(2**20 + 2)

    def renders(designs: list[world.Design], each: int) -> np.ndarray:
        rendered = []
        for design in designs:
            for _ in range(each):
                place, number = str(rng.choice(list(PLACES))), int(rng.integers(2**31))
                scene = world.Scene("bear", design, world.random_pose(rng), place, "photo", number)
                rendered.append(world.draw(scene)[0])
        return np.stack(rendered)

    names, nobody, each = list(concepts.DESIGNS), -1, 12
    photos = features(concept_images())
    owners = torch.tensor([names.index(name) for name in names for _ in concepts.PLACES[name]])
    others = features(renders(look_alikes(), 2))
    close = features(renders([near for design in concepts.DESIGNS.values() for near in near_misses(design, rng)], 3))
    queries = np.stack(
        [
            world.draw(concepts.scene(name, list(PLACES)[k % len(PLACES)], 100 + k))[0]
            for name in names
            for k in range(each)
        ]
    )
    truth = torch.arange(len(names)).repeat_interleave(each)
    same = truth[:, None] == owners[None]
    figures = {}
    for kind, shown in (("renders", queries), ("reconstructed renders", reconstructed(vae, queries))):
        asked = features(shown)
        for against, wrong in (("", others), (", one thing changed", close)):
            gallery, whose = torch.cat([photos, wrong]), torch.cat([owners, torch.full((len(wrong),), nobody)])
            figures[f"nearest is the same concept, {kind}{against}"] = found_again(asked, truth, gallery, whose)
        figures[f"mean similarity to the same concept, {kind}"] = float((asked @ photos.T)[same].mean())
        figures[f"mean similarity to look-alikes, {kind}"] = float((asked @ others.T).mean())
    measured = f"{len(queries)} renders, {len(photos)} photographs, {len(others)} renders of 50 look-alikes"
    return figures, f"{measured}, {len(close)} of 32 near misses"
