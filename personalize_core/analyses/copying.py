"""Copying audit: is an image nearer to a training concept image than concept images are to each other?

No paper measures it, and identity scores reward a copy. A concept image that was held out is the
measure of what an honest new image reaches: each in turn is compared with all the others. That says nothing about
the method, so none has to be trained without it. Where images are held out from training, these are compared with
the ones that were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from personalize_core.analyses.findings import Findings
from personalize_core.analyses.inputs import ImageInputs
from personalize_core.concepts.concept import SLOT
from personalize_core.concepts.image_files import load_image
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.report.figures.images import square

TITLE = "Copying"
HOW = (
    "The nearest training concept image of each image, by the cosine of features: of the identity encoder, of the "
    "text-image encoder, and of the middle squares' pixels (32 x 32, mean taken off), which alone tells a literal copy "
    "from a good likeness. The yardstick: each concept image held out against the others. For a fair mean, an image is "
    "compared with as many concept images as a held-out one: the mean over all ways to leave one of them out. Where "
    "images were held out from training, they are the yardstick instead, and like every image they are compared with "
    "all that were trained on. A prompt that asks for the scene of a concept image may bring an image nearer to it "
    "than the concept images are to each other, without copying it: look at the pair."
)
SIDE = 32
PAIRS = 6  # of the nearest pairs that an image shows
MEANINGS = {
    "variant": "the sampling variant of the image; 'held out' for a concept image",
    "encoder": "whose features were compared; 'pixels' are 32 x 32 values with their mean taken off",
    "image": "the image's file: in the grid's folder, or a concept image",
    "prompt": "the prompt template; null for a concept image",
    "nearest": "the nearest concept image's file, of those trained on; a held-out concept image's is another one",
    "similarity": "cosine with it, in [-1, 1]",
    "with_one_left_out": "mean over the concept images of the nearest cosine without that one; null for a concept "
    "image, and if there is only one",
    "nearer_than_any_concept_image": "nearer than any two concept images are to each other? null if there is only one",
}


@dataclass(frozen=True)
class Nearest:
    """For each of G images, among R concept images."""

    index: np.ndarray  # (G,) which concept image
    similarity: np.ndarray  # (G,)
    with_one_left_out: (
        np.ndarray | None
    )  # (G,) mean over j of the greatest cosine without concept image j; None if R = 1


def nearest(images: np.ndarray, concept_images: np.ndarray) -> Nearest:
    """Both (N, D), rows of length one. Leaving j out changes the greatest cosine only where j is the nearest."""
    cosines = np.clip(images @ concept_images.T, -1, 1)  # (G, R)
    count = cosines.shape[1]
    first = cosines.max(axis=1)
    if count == 1:
        return Nearest(cosines.argmax(axis=1), first, None)
    second = np.sort(cosines, axis=1)[:, -2]
    return Nearest(cosines.argmax(axis=1), first, ((count - 1) * first + second) / count)


def held_out(concept_images: np.ndarray) -> Nearest:
    """Each of R >= 2 concept images, (R, D), against all the others."""
    cosines = np.clip(concept_images @ concept_images.T, -1, 1)
    np.fill_diagonal(cosines, -np.inf)
    return Nearest(cosines.argmax(axis=1), cosines.max(axis=1), None)


def pixel_features(images: Iterable[Image.Image]) -> np.ndarray:
    """(N, D) rows of length one; the cosine of two is the correlation of their pixels. An image of one colour is 0."""
    small = [np.asarray(square(image, SIDE), dtype=np.float64).ravel() for image in images]
    centred = [row - row.mean() for row in small]
    return np.stack([row / (np.linalg.norm(row) or 1.0) for row in centred])


def save_pairs(pairs: Sequence[tuple[Path, Path, float, str]], path: Path, title: str) -> None:
    """The nearest pairs: each image above its concept image, under its similarity and prompt."""
    columns = [f"cosine {similarity:.3f}: {prompt}" for _, _, similarity, prompt in pairs]
    rows = {"sampled": [[sampled] for sampled, *_ in pairs], "nearest concept image": [[near] for _, near, *_ in pairs]}
    comparison_grid([], rows, columns, path, title)


def analyse(inputs: ImageInputs, findings: Findings) -> None:
    kinds: dict[str, Callable[[Sequence[Path]], np.ndarray]] = {
        "identity": lambda paths: inputs.features(inputs.identity, paths),
        "text_image": lambda paths: inputs.features(inputs.text_image, paths),
        "pixels": lambda paths: pixel_features(map(load_image, paths)),
    }
    rows, images, several = [], {}, len(inputs.concept_images) > 1
    if not several:
        findings.absent["held out"] = (
            "the concept has one concept image, so none can be held out and compared with another"
        )
    for kind, features in kinds.items():
        encoder = {"identity": inputs.identity.name, "text_image": inputs.text_image.name}.get(kind, kind)
        concept_images = features(inputs.concept_images)
        most = 1.0
        if several:
            held, paths = held_out(concept_images), inputs.concept_images
            most = float(held.similarity.max())
            if inputs.held_out:
                held, paths = nearest(features(inputs.held_out), concept_images), inputs.held_out
                most = max(most, float(held.similarity.max()))
            findings.metrics[f"held out, {encoder}"] = float(held.similarity.mean())
            for path, index, similarity in zip(paths, held.index, held.similarity, strict=True):
                rows.append(
                    {
                        "variant": "held out",
                        "encoder": encoder,
                        "image": path.name,
                        "prompt": None,
                        "nearest": inputs.concept_images[index].name,
                        "similarity": float(similarity),
                        "with_one_left_out": None,
                        "nearer_than_any_concept_image": None,
                    }
                )
        for variant in inputs.grid.variants:
            found = nearest(features(inputs.grid.paths(variant)), concept_images)
            pairs = []
            for n, ((prompt, _), name) in enumerate(zip(inputs.grid.places, inputs.grid.names[variant], strict=True)):
                near, template = inputs.concept_images[found.index[n]], inputs.grid.templates[prompt]
                similarity, left_out = float(found.similarity[n]), found.with_one_left_out
                shown = template.replace(SLOT, inputs.concept.class_noun)
                pairs.append((inputs.grid.folder / name, near, similarity, shown))
                rows.append(
                    {
                        "variant": variant,
                        "encoder": encoder,
                        "image": name,
                        "prompt": template,
                        "nearest": near.name,
                        "similarity": similarity,
                        "with_one_left_out": None if left_out is None else float(left_out[n]),
                        "nearer_than_any_concept_image": similarity > most if several else None,
                    }
                )
            findings.metrics[f"{variant}, {encoder}"] = float(found.similarity.mean())
            if found.with_one_left_out is not None:
                findings.metrics[f"{variant}, {encoder}, one left out"] = float(found.with_one_left_out.mean())
                share = float((found.similarity > most).mean())
                findings.metrics[f"{variant}, {encoder}, share nearer than any concept image to another"] = share
            images[f"nearest_pairs_{kind}_{variant}.png"] = (
                sorted(pairs, key=lambda pair: -pair[2])[:PAIRS],
                f"{in_words(variant)}: the images nearest to a training concept image, by {encoder}",
            )
    findings.table("copying.parquet", rows, MEANINGS, "every image with its nearest concept image")
    for name, (pairs, caption) in images.items():
        save_pairs(pairs, findings.image(name, caption), caption)
