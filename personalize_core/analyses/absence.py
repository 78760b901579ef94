"""In how many images is the concept missing? A mean identity hides whether all are half right or half all wrong."""

from __future__ import annotations

import numpy as np
import torch

from personalize_core.analyses import shared_plots
from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import ImageInputs
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
    "prompt": "the prompt template",
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


def analyse(inputs: ImageInputs, findings: Findings) -> None:
    if inputs.is_baseline:
        raise NotDefined("its images are what the threshold is set from: they show another thing of the kind")
    if not inputs.baseline:
        raise NotDefined(
            "there is no grid of the base model for this concept and these prompts, and its images set the threshold; "
            f"`personalize evaluate {inputs.concept.name} -m {BASELINE}` samples it"
        )
    if len(inputs.concept_images) < 2:
        raise NotDefined("the concept has one concept image, and the threshold takes concept images against each other")
    if len(inputs.known) < 2:
        raise NotDefined(f"a {inputs.identity.looks_for} is found in one concept image, and the threshold takes two")
    present = real_alignment_per_image(torch.from_numpy(inputs.known)).numpy()
    other = inputs.identities(inputs.features(inputs.identity, inputs.baseline.paths(inputs.baseline.variants[0])))
    value, accuracy = threshold(other, present)
    if accuracy < LEAST_ACCURACY:
        raise NotDefined(
            f"by {inputs.identity.name} the concept images and the base model's images of a "
            f"{inputs.concept.class_noun} cannot be told apart: the best threshold is right for {accuracy:.0%} "
            f"of them, less than {LEAST_ACCURACY:.0%}"
        )
    findings.metrics |= {"threshold": value, "balanced accuracy of the threshold": accuracy}
    findings.metrics |= {"concept_images": len(present), "images of the class noun": len(other)}
    rows, groups = (
        [],
        {"concept_images": present.tolist(), f"base model, a {inputs.concept.class_noun}": other.tolist()},
    )
    for variant in inputs.grid.variants:
        identities = inputs.identities(inputs.features(inputs.identity, inputs.grid.paths(variant)))
        missing = identities < value
        findings.metrics[f"{variant}, share absent"] = float(missing.mean())
        findings.metrics[f"{variant}, images"] = len(missing)
        groups[in_words(variant)] = identities.tolist()
        places = zip(inputs.grid.places, inputs.grid.names[variant], identities, missing, strict=True)
        rows += [
            {
                "variant": variant,
                "prompt_index": prompt,
                "prompt": inputs.grid.templates[prompt],
                "image": name,
                "identity": float(identity),
                "absent": bool(below),
            }
            for (prompt, _), name, identity, below in places
        ]
    findings.table("absence.parquet", rows, MEANINGS, "every image's identity, and whether it is below")
    shares = ", ".join(
        f"{in_words(variant)} {findings.metrics[f'{variant}, share absent']:.0%}" for variant in inputs.grid.variants
    )
    caption = f"identity of each image, and the threshold below which the concept counts as absent: {shares}"
    path = findings.image("absence_threshold.png", caption)
    panel = shared_plots.Panel(
        f"identity, by {inputs.identity.name}", {"one image": list(groups.values())}, {"threshold": value}
    )
    title = f"{inputs.concept.name} is missing in: {shares}"
    shared_plots.dots([panel], list(groups), path, title, "pale: single images; strong: their mean")
