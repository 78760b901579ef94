"""Diversity across seeds: how much the images of one prompt differ.

OFT (Qiu et al. 2023) reports the mean LPIPS over pairs of images. LPIPS needs layers that its package ships as a
pickle, which nothing here reads, so this is another quantity under another name. It must not be compared with
published LPIPS. Beside it stands the Vendi score (Friedman & Dieng 2023) of the same features.
"""

from __future__ import annotations

import numpy as np

from personalize_core.analyses import shared_plots
from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import ImageInputs
from personalize_core.metrics.tables import BASELINE

TITLE = "Diversity across seeds"
HOW = (
    "Mean over all pairs of images of one prompt of the distance of their features, 1 - cosine; then over prompts. "
    "This is not LPIPS (its weights come as a pickle): do not compare it with published values. The Vendi "
    "score of the same features is the effective number of different images among those of a prompt. Beside both the "
    "base model's images of the class noun in the same prompts, and the concept images among each other. Features of "
    "the identity encoder see the thing more than what is around it; those of the text-image encoder see both."
)
MEANINGS = {
    "variant": "the sampling variant, or the base model",
    "encoder": "whose features were compared",
    "prompt_index": "place in the prompt list, from 0",
    "prompt": "the prompt template",
    "images": "how many images the pairs are of",
    "distance": "mean of 1 - cosine over their pairs, in [0, 2]",
    "vendi": "their Vendi score: the effective number of different images, from 1 to images; those in which the "
    "encoder finds nothing that it looks for are left out, and 0 says that none is left",
}


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Of N >= 2 rows of length one, (N, D): the mean of 1 - cosine over the N (N - 1) / 2 pairs.

    The rows' cosines with their sum count each pair twice and each row with itself once. A row of zeros, of an image in
    which the encoder finds nothing that it looks for, has a distance of 1 to every other.
    """
    count = len(features)
    if count < 2:
        raise ValueError("a distance takes two images at least")
    cosines = (float(np.square(features.sum(axis=0)).sum() - np.square(features).sum())) / (count * (count - 1))
    return 1.0 - min(cosines, 1.0)


def vendi_score(features: np.ndarray) -> float:
    """Of N rows of length one, (N, D): the effective number of different ones, from 1 to N.

    Friedman & Dieng 2023, definition 3.1: exp of the entropy of the eigenvalues of K / N, K the cosines of all pairs.
    Beside zeros, which add nothing, these are the eigenvalues of the features' (D, D) second moment (their sec. 3.3).
    Rows of zeros, of images in which the encoder finds nothing, are left out; of such rows alone it is 0.
    """
    features = features[features.any(axis=1)].astype(np.float64)
    if not (count := len(features)):
        return 0.0
    width = features.shape[1]
    products = features @ features.T if count <= width else features.T @ features
    shares = np.linalg.eigvalsh(products / count)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def analyse(inputs: ImageInputs, findings: Findings) -> None:
    series = (
        {BASELINE: (inputs.baseline, inputs.baseline.variants[0])} if inputs.baseline and not inputs.is_baseline else {}
    )
    series |= {variant: (inputs.grid, variant) for variant in inputs.grid.variants}
    several = {prompt: some for prompt, some in inputs.grid.of_prompts().items() if len(some) > 1}
    if not several:
        raise NotDefined(
            "there is one image a prompt; sample two or more (images_per_prompt) to compare them"
            if not inputs.made_elsewhere
            else "there is one image a prompt, so none to compare it with"
        )
    if not inputs.baseline:
        findings.absent[BASELINE] = "there is no grid of the base model for this concept and these prompts"
    if alone := len(inputs.grid.of_prompts()) - len(several):
        findings.absent["prompts"] = f"{alone} prompts have one image each, so none to compare it with"
    rows, panels, templates = [], [], [inputs.grid.templates[prompt] for prompt in several]
    for encoder in (inputs.identity, inputs.text_image):
        values: dict[str, list[list[float]]] = {}
        for name, (grid, variant) in series.items():
            seen, own = inputs.features(encoder, grid.paths(variant)), []
            for prompt, places in grid.of_prompts().items():
                if len(places) > 1:
                    own.append(
                        {
                            "variant": name,
                            "encoder": encoder.name,
                            "prompt_index": prompt,
                            "prompt": grid.templates[prompt],
                            "images": len(places),
                            "distance": mean_pairwise_distance(seen[places]),
                            "vendi": vendi_score(seen[places]),
                        }
                    )
            rows += own
            if not own:
                continue
            findings.metrics[f"{name}, {encoder.name}"] = sum(row["distance"] for row in own) / len(own)
            findings.metrics[f"{name}, {encoder.name}, Vendi score"] = sum(row["vendi"] for row in own) / len(own)
            by = "prompt" if inputs.made_elsewhere else "prompt_index"  # those have numbers of their own
            distances = {row[by]: row["distance"] for row in own}
            keys = templates if inputs.made_elsewhere else several
            values[name] = [[distances[key]] if key in distances else [] for key in keys]
        lines = {}
        if len(inputs.concept_images) > 1:
            real = inputs.features(encoder, inputs.concept_images)
            between = mean_pairwise_distance(real)
            findings.metrics[f"concept images, {encoder.name}"] = lines["concept images among each other"] = between
            findings.metrics[f"concept images, {encoder.name}, Vendi score"] = vendi_score(real)
        panels.append(shared_plots.Panel(f"distance, by {encoder.name}", values, lines))
    if len(inputs.concept_images) < 2:
        findings.absent["concept_images"] = "the concept has one concept image, which differs from no other"
    findings.table("diversity.parquet", rows, MEANINGS, "the mean distance and the Vendi score of each prompt's images")
    path = findings.image("diversity_across_seeds.png", "how much the images of one prompt differ")
    title = f"{inputs.concept.name}: how much the images of a prompt differ"
    shared_plots.dots(panels, templates, path, title, "right: more different")
