"""In how many images is the concept missing? A mean identity hides whether all are half right or half all wrong."""

from __future__ import annotations

import numpy as np
import torch

from personalize_core.analyses import plots
from personalize_core.analyses.bench import Bench
from personalize_core.analyses.results import NotDefined, Results
from personalize_core.metrics.similarity import real_alignment_per_image
from personalize_core.metrics.tables import BASELINE
from personalize_core.report.display_names import in_words

TITLE = "Images without the concept"
HOW = (
    "An image's identity is its mean cosine with the concept images. The threshold is set from two kinds of image that "
    "are known: the base model's of the class noun, which show another thing of the kind, and the concept images, each "
    "against the others. It is where (share of the first below it + share of the second above it) / 2 is greatest; of "
    "several such places the middle of the widest gap. An image below it counts as without the concept."
)
LEAST_ACCURACY = 0.8  # of the threshold; below, the encoder cannot tell the two kinds, and no share is given
MEANINGS = {
    "variant": "the sampling variant",
    "prompt_index": "place in the prompt list, from 0",
    "prompt": "the template that was drawn",
    "image": "the image's file in the grid's folder",
    "identity": "mean cosine with the concept images, by the identity encoder",
    "absent": "is it below the threshold?",
}


def threshold(without: np.ndarray, with_concept: np.ndarray) -> tuple[float, float]:
    """Where two kinds of image part best, and the balanced accuracy there, in [0.5, 1] (see HOW).

    Args:
        without: (N,) identities of images without the concept.
        with_concept: (M,) of images with it.
    """
    values = np.unique(np.concatenate([without, with_concept]))
    if len(values) == 1:
        return float(values[0]), 0.5
    places, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    below = np.searchsorted(np.sort(without), places) / len(without)
    above = 1 - np.searchsorted(np.sort(with_concept), places) / len(with_concept)
    accuracy = (below + above) / 2
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    chosen = best[gaps[best].argmax()]
    return float(places[chosen]), float(accuracy[chosen])


def analyse(bench: Bench, into: Results) -> None:
    if bench.is_baseline:
        raise NotDefined("its images are what the threshold is set from: they show another thing of the kind")
    if not bench.floor:
        raise NotDefined(
            "the base model has drawn no grid of this concept in these prompts, and its images set the threshold; "
            f"`personalize evaluate {bench.concept.name} -m {BASELINE}` draws it"
        )
    if len(bench.concept_images) < 2:
        raise NotDefined("the concept has one concept image, and the threshold takes concept images against each other")
    concept_images = torch.from_numpy(bench.features(bench.identity, bench.concept_images))
    present = real_alignment_per_image(concept_images).numpy()
    other = bench.identities(bench.features(bench.identity, bench.floor.paths(bench.floor.variants[0])))
    value, accuracy = threshold(other, present)
    if accuracy < LEAST_ACCURACY:
        raise NotDefined(
            f"by {bench.identity.name} the concept images and the base model's images of a {bench.concept.class_noun} "
            f"cannot be told apart: the best threshold is right for {accuracy:.0%} of them, less than "
            f"{LEAST_ACCURACY:.0%}"
        )
    into.metrics |= {"threshold": value, "balanced accuracy of the threshold": accuracy}
    into.metrics |= {"concept_images": len(present), "images of the class noun": len(other)}
    rows, groups = [], {"concept_images": present.tolist(), f"base model, a {bench.concept.class_noun}": other.tolist()}
    for variant in bench.grid.variants:
        identities = bench.identities(bench.features(bench.identity, bench.grid.paths(variant)))
        missing = identities < value
        into.metrics[f"{variant}, share absent"] = float(missing.mean())
        into.metrics[f"{variant}, images"] = len(missing)
        groups[in_words(variant)] = identities.tolist()
        places = zip(bench.grid.places, bench.grid.names[variant], identities, missing, strict=True)
        rows += [
            {
                "variant": variant,
                "prompt_index": prompt,
                "prompt": bench.grid.templates[prompt],
                "image": name,
                "identity": float(identity),
                "absent": bool(below),
            }
            for (prompt, _), name, identity, below in places
        ]
    into.table("absence.parquet", rows, MEANINGS, "every image's identity, and whether it is below")
    shares = ", ".join(
        f"{in_words(variant)} {into.metrics[f'{variant}, share absent']:.0%}" for variant in bench.grid.variants
    )
    caption = f"identity of each image, and the threshold below which the concept counts as absent: {shares}"
    path = into.image("absence_threshold.png", caption)
    panel = plots.Panel(
        f"identity, by {bench.identity.name}", {"one image": list(groups.values())}, {"threshold": value}
    )
    title = f"{bench.concept.name} is missing in: {shares}"
    plots.dots([panel], list(groups), path, title, "pale: single images; strong: their mean")
