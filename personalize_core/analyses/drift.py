"""Drift: what the personalized model does to prompts that do not mention the concept.

DreamBooth's "language drift" (Ruiz et al. 2023, sec. 3.2) is the case of the class noun, and prior preservation is
there to stop it. Both models sample from the same noise, so an untouched model differs by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import Inputs
from personalize_core.concepts.concept import SLOT
from personalize_core.methods.interface import Method
from personalize_core.methods.recipe import Recipe
from personalize_core.metrics.tables import BASELINE
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.image_grids import comparison_grid

TITLE = "Drift"
HOW = (
    "The same prompts under the same noise by the base model and with what was learned put in; none of them mentions "
    "the concept. Differences are 1 - cosine of features, and the root of the mean squared difference of pixels in "
    "[0, 1]. 0 in both: the images are the same."
)
OTHER_NOUNS = ("cat", "car", "mug")  # of which two are taken that are not the class noun
TEMPLATES = 4  # of the prompt list, at most
MEANINGS = {
    "variant": "the sampling variant",
    "prompt": "the prompt",
    "kind": "'class noun', or 'other noun': of another kind of thing",
    "feature_distance": "1 - cosine of the two images' features by the identity encoder, in [0, 2]",
    "text_image_distance": "the same by the text-image encoder",
    "pixel_difference": "root mean square of the difference of pixels, in [0, 1]",
}


def asked_prompts(templates: Sequence[str], class_noun: str) -> list[tuple[str, str]]:
    """(prompt, kind): the first templates of the list with the class noun in the slot, then with two other nouns."""
    others = [noun for noun in OTHER_NOUNS if noun != class_noun][:2]
    some = list(templates[:TEMPLATES])
    prompts = [(template.replace(SLOT, class_noun), "class noun") for template in some]
    return prompts + [(template.replace(SLOT, noun), "other noun") for noun in others for template in some]


def feature_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) of 1 - cosine; both (N, D), rows of length one, or of zeros, of which two are alike."""
    neither = ~one.any(axis=1) & ~other.any(axis=1)
    return np.where(neither, 0, 1 - np.clip((one * other).sum(axis=1), -1, 1))


def pixel_differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1]; both (N, H, W, 3) uint8."""
    difference = (one.astype(np.float64) - other.astype(np.float64)) / 255
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3)))


def save_pairs(prompts: Sequence[str], images: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """A row for each model; images: its name -> (N, H, W, 3) uint8, one for each prompt."""
    rows = {in_words(name): [[Image.fromarray(one)] for one in sampled] for name, sampled in images.items()}
    comparison_grid([], rows, prompts, path, title)


def analyse(inputs: Inputs, findings: Findings) -> None:
    if inputs.is_baseline:
        raise NotDefined("the method learns nothing, so it is the base model")
    asked = asked_prompts(inputs.grid.templates, inputs.concept.class_noun)
    prompts, places = [prompt for prompt, _ in asked], [(place, 0) for place in range(len(asked))]
    untouched = Method(Recipe(), inputs.base, inputs.concept)  # the interface's defaults change nothing
    sampled = {BASELINE: inputs.sample(untouched, prompts, places)}
    sampled |= {
        variant: inputs.sample(inputs.ready(variant, prompts), prompts, places) for variant in inputs.grid.variants
    }
    by_identity, by_text_image = (
        {name: inputs.features_of(encoder, images) for name, images in sampled.items()}
        for encoder in (inputs.identity, inputs.text_image)
    )
    rows = []
    for variant in inputs.grid.variants:
        measures = {
            "feature_distance": feature_distances(by_identity[variant], by_identity[BASELINE]),
            "text_image_distance": feature_distances(by_text_image[variant], by_text_image[BASELINE]),
            "pixel_difference": pixel_differences(sampled[variant], sampled[BASELINE]),
        }
        rows += [
            {"variant": variant, "prompt": prompt, "kind": kind}
            | {name: float(values[n]) for name, values in measures.items()}
            for n, (prompt, kind) in enumerate(asked)
        ]
        for wanted in dict.fromkeys(kind for _, kind in asked):
            of_kind = [n for n, (_, kind) in enumerate(asked) if kind == wanted]
            for name, values in measures.items():
                findings.metrics[f"{variant}, {wanted}, {name.replace('_', ' ')}"] = float(values[of_kind].mean())
    findings.table("drift.parquet", rows, MEANINGS, "every prompt without the concept")
    caption = "prompts that do not mention the concept, by the base model and with what was learned; same noise"
    each = len(asked) // 3
    shown = [n for n in range(len(asked)) if n % each < 2]  # of each noun two templates
    some = {name: images[shown] for name, images in sampled.items()}
    title = f"{inputs.concept.name}: prompts that do not mention it"
    save_pairs([prompts[n] for n in shown], some, findings.image("drift_pairs.png", caption), title)
