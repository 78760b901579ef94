"""Diversity across seeds: how much the images of one prompt differ.

OFT reports the mean LPIPS over pairs (methods.md 13.1). LPIPS needs weights that come with no package that we may
use, so this is another quantity under another name, and not to be set beside published LPIPS.
"""

from __future__ import annotations

import numpy as np

from personalize_core.analyses import plots
from personalize_core.analyses.bench import Bench
from personalize_core.analyses.results import NotDefined, Results
from personalize_core.metrics.tables import BASELINE

TITLE = "Diversity across seeds"
HOW = (
    "Mean over all pairs of images of one prompt of the distance of their features, 1 - cosine; then over prompts. "
    "Not LPIPS, whose weights are not to be had here: the numbers do not compare with published ones. Beside it the "
    "base model's images of the class noun in the same prompts, and the concept images among each other. Features of "
    "the identity encoder see the thing more than what is around it; those of the text-image encoder see both."
)
MEANINGS = {
    "variant": "the sampling variant, or the base model",
    "encoder": "whose features were compared",
    "prompt_index": "place in the prompt list, from 0",
    "prompt": "the template that was drawn",
    "images": "how many images the pairs are of",
    "distance": "mean of 1 - cosine over their pairs, in [0, 2]",
}


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Of N >= 2 rows of length one, (N, D): the mean of 1 - cosine over the N (N - 1) / 2 pairs.

    The rows' cosines with their sum count each pair twice and each row with itself once.
    """
    count = len(features)
    if count < 2:
        raise ValueError("a distance takes two images at least")
    cosines = (float(np.square(features.sum(axis=0)).sum()) - count) / (count * (count - 1))
    return 1.0 - min(cosines, 1.0)


def analyse(bench: Bench, into: Results) -> None:
    images = bench.grid.images_per_prompt
    if images < 2:
        raise NotDefined("the grid has one image a prompt; draw two or more (images_per_prompt) to see them differ")
    series = {BASELINE: (bench.floor, bench.floor.variants[0])} if bench.floor and not bench.is_baseline else {}
    series |= {variant: (bench.grid, variant) for variant in bench.grid.variants}
    if not bench.floor:
        into.absent[BASELINE] = "the base model has drawn no grid of this concept in these prompts"
    rows, panels = [], []
    for encoder in (bench.identity, bench.text_image):
        values: dict[str, list[list[float]]] = {}
        for name, (grid, variant) in series.items():
            per_prompt = bench.features(encoder, grid.paths(variant)).reshape(len(grid.templates), images, -1)
            distances = [mean_pairwise_distance(some) for some in per_prompt]
            into.metrics[f"{name}, {encoder.name}"] = sum(distances) / len(distances)
            values[name] = [[distance] for distance in distances]
            rows += [
                {
                    "variant": name,
                    "encoder": encoder.name,
                    "prompt_index": prompt,
                    "prompt": grid.templates[prompt],
                    "images": images,
                    "distance": distance,
                }
                for prompt, distance in enumerate(distances)
            ]
        lines = {}
        if len(bench.concept_images) > 1:
            between = mean_pairwise_distance(bench.features(encoder, bench.concept_images))
            into.metrics[f"concept images, {encoder.name}"] = lines["concept images among each other"] = between
        panels.append(plots.Panel(f"distance, by {encoder.name}", values, lines))
    if len(bench.concept_images) < 2:
        into.absent["concept_images"] = "the concept has one concept image, which differs from no other"
    into.table("diversity.parquet", rows, MEANINGS, "the mean distance of each prompt's images")
    path = into.image("diversity_across_seeds.png", "how much the images of one prompt differ")
    title = f"{bench.concept.name}: how much the {images} images of a prompt differ"
    plots.dots(panels, bench.grid.templates, path, title, "right: more different")
