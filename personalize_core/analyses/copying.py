"""Copying audit: is a picture nearer to a training photograph than photographs of the concept are to each other?

Ours; no paper of methods.md measures it, and identity scores reward a copy. A photograph that was held out is the
measure of what an honest new picture reaches: each in turn is compared with all the others. That says nothing about
the method, so none has to be trained without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from personalize_core.analyses.bench import Bench, opened
from personalize_core.analyses.results import Results
from personalize_core.report import figures
from personalize_core.report.display_names import in_words

TITLE = "Copying"
HOW = (
    "The nearest training photograph of each picture, by the cosine of features: of the identity encoder, of the "
    "text-image encoder, and of the middle squares' pixels (32 x 32, mean taken off), which alone tells a literal copy "
    "from a good likeness. The measure is each photograph held out against the others. For a fair mean, a picture is "
    "compared with as many photographs as a held-out one: the mean over all ways to leave one photograph out. Where a "
    "prompt asks for a photograph's own place, and no two photographs share one, being nearer is no copy yet: look."
)
SIDE = 32
PAIRS = 6  # of the nearest pairs that a picture shows
MEANINGS = {
    "variant": "the sampling variant that drew the picture; 'held out' for a photograph",
    "encoder": "whose features were compared; 'pixels' are 32 x 32 values with their mean taken off",
    "image": "the picture's file: in the grid's folder, or a photograph",
    "prompt": "the template that was drawn; null for a photograph",
    "nearest": "the nearest photograph's file; a held-out photograph's is another one",
    "similarity": "cosine with it, in [-1, 1]",
    "with_one_left_out": "mean over the photographs of the nearest cosine without it; null if there is one, or for one",
    "nearer_than_any_photograph": "is it nearer than any photograph is to another? null if there is one photograph",
}


@dataclass(frozen=True)
class Nearest:
    """For each of G pictures, among R photographs."""

    index: np.ndarray  # (G,) which photograph
    similarity: np.ndarray  # (G,)
    with_one_left_out: np.ndarray | None  # (G,) mean over j of the greatest cosine without photograph j; None if R = 1


def nearest(pictures: np.ndarray, photographs: np.ndarray) -> Nearest:
    """Both (N, D), rows of length one. Leaving j out changes the greatest cosine only where j is the nearest."""
    cosines = np.clip(pictures @ photographs.T, -1, 1)  # (G, R)
    count = cosines.shape[1]
    first = cosines.max(axis=1)
    if count == 1:
        return Nearest(cosines.argmax(axis=1), first, None)
    second = np.sort(cosines, axis=1)[:, -2]
    return Nearest(cosines.argmax(axis=1), first, ((count - 1) * first + second) / count)


def held_out(photographs: np.ndarray) -> Nearest:
    """Each of R >= 2 photographs, (R, D), against all the others."""
    cosines = np.clip(photographs @ photographs.T, -1, 1)
    np.fill_diagonal(cosines, -np.inf)
    return Nearest(cosines.argmax(axis=1), cosines.max(axis=1), None)


def pixel_features(pictures: Sequence[Image.Image]) -> np.ndarray:
    """(N, D) rows of length one; the cosine of two is the correlation of their pixels. A picture of one colour is 0."""
    small = [np.asarray(figures.square(picture, SIDE), dtype=np.float64).ravel() for picture in pictures]
    centred = [row - row.mean() for row in small]
    return np.stack([row / (np.linalg.norm(row) or 1.0) for row in centred])


def draw(pairs: Sequence[tuple[Path, Path, float, str]], path: Path, title: str) -> None:
    """The nearest pairs: each picture above its photograph, under its similarity and prompt."""
    columns = [f"{similarity:.3f}  {prompt}" for _, _, similarity, prompt in pairs]
    rows = {"drawn": [[drawn] for drawn, *_ in pairs], "nearest photograph": [[near] for _, near, *_ in pairs]}
    figures.comparison_grid([], rows, columns, path, title)


def analyse(bench: Bench, into: Results) -> None:
    kinds: dict[str, Callable[[Sequence[Path]], np.ndarray]] = {
        "identity": lambda paths: bench.features(bench.identity, paths),
        "text_image": lambda paths: bench.features(bench.text_image, paths),
        "pixels": lambda paths: pixel_features(opened(paths)),
    }
    rows, pictures, several = [], {}, len(bench.photographs) > 1
    if not several:
        into.absent["held out"] = "the concept has one photograph, so none can be held out and compared with another"
    for kind, features in kinds.items():
        encoder = {"identity": bench.identity.name, "text_image": bench.text_image.name}.get(kind, kind)
        photographs = features(bench.photographs)
        most = 1.0
        if several:
            held = held_out(photographs)
            most = float(held.similarity.max())
            into.numbers[f"held out, {encoder}"] = float(held.similarity.mean())
            for path, index, similarity in zip(bench.photographs, held.index, held.similarity, strict=True):
                rows.append(
                    {
                        "variant": "held out",
                        "encoder": encoder,
                        "image": path.name,
                        "prompt": None,
                        "nearest": bench.photographs[index].name,
                        "similarity": float(similarity),
                        "with_one_left_out": None,
                        "nearer_than_any_photograph": None,
                    }
                )
        for variant in bench.grid.variants:
            found = nearest(features(bench.grid.paths(variant)), photographs)
            pairs = []
            for n, ((prompt, _), name) in enumerate(zip(bench.grid.places, bench.grid.names[variant], strict=True)):
                near, template = bench.photographs[found.index[n]], bench.grid.templates[prompt]
                similarity, left_out = float(found.similarity[n]), found.with_one_left_out
                pairs.append((bench.grid.folder / name, near, similarity, template))
                rows.append(
                    {
                        "variant": variant,
                        "encoder": encoder,
                        "image": name,
                        "prompt": template,
                        "nearest": near.name,
                        "similarity": similarity,
                        "with_one_left_out": None if left_out is None else float(left_out[n]),
                        "nearer_than_any_photograph": similarity > most if several else None,
                    }
                )
            into.numbers[f"{variant}, {encoder}"] = float(found.similarity.mean())
            if found.with_one_left_out is not None:
                into.numbers[f"{variant}, {encoder}, one left out"] = float(found.with_one_left_out.mean())
                share = float((found.similarity > most).mean())
                into.numbers[f"{variant}, {encoder}, share nearer than any photograph to another"] = share
            pictures[f"nearest_pairs_{kind}_{variant}.png"] = (
                sorted(pairs, key=lambda pair: -pair[2])[:PAIRS],
                f"{in_words(variant)}: the pictures nearest to a training photograph, by {encoder}",
            )
    into.table("copying.parquet", rows, MEANINGS, "every picture with its nearest photograph")
    for name, (pairs, caption) in pictures.items():
        draw(pairs, into.picture(name, caption), caption)
