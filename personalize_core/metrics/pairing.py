"""Which scores of two variants are compared with which: image by image, prompt by prompt, or mean by mean.

Images that were sampled here share their first noise wherever prompt and image_index are equal. Images made elsewhere
share at most their seed with each other, and only the prompt with ours. So two variants are compared

* on images of the same prompt and noise, if both were sampled here; or of the same prompt and seed, if both were made
  elsewhere and seeds are known;
* else on the means of prompts that both have;
* else on the means of concepts that both have, with the prompts of each as a sample of their own.

The second and third way are used where the way before them would leave out more than half of the images of either,
among the concepts that both have: no way can compare images of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from personalize_core.metrics import statistics
from personalize_core.metrics.statistics import DRAWS, LEVEL, Estimate, Noise

BY_NOISE, BY_SEED, BY_PROMPT, UNPAIRED = "prompt and noise", "prompt and seed", "prompt", "unpaired"
WAYS = (BY_NOISE, BY_SEED, BY_PROMPT, UNPAIRED)
MEANING = (
    f"{BY_NOISE!r} or {BY_SEED!r}: image by image; {BY_PROMPT!r}: the means of prompts that both have; {UNPAIRED!r}: "
    "the means of concepts that both have, each over prompts of its own"
)
LEAST = 0.5  # share of the images of either that a way of pairing must keep
HERE, SEED = "", "seed"  # kinds of noise; that of an image without a seed is its variant's own

# What an image's noise is: equal (kind, noise) of one prompt belong together.
KIND = (
    pl.when(pl.col("source").is_null())
    .then(pl.lit(HERE))
    .when(pl.col("seed").is_not_null())
    .then(pl.lit(SEED))
    .otherwise(pl.col("variant"))
    .alias("kind")
)
NOISE = (
    pl.when(pl.col("source").is_null())
    .then(pl.col("image_index").cast(pl.UInt64))
    .otherwise(pl.coalesce("seed", pl.col("image_index").cast(pl.UInt64)))
    .alias("noise")
)
# A list that holds a prompt twice samples it from two noises; elsewhere prompts have no place.
LINE = pl.when(pl.col("source").is_null()).then(pl.col("prompt_index")).otherwise(-1).alias("line")
PLACE = ["concept", "prompt_number", "line", "kind", "noise"]  # of an image: the same for all variants


@dataclass(frozen=True)
class Images:
    """The scores of one variant by one metric."""

    concepts: np.ndarray  # (N,) numbers that mean the same for all variants
    prompts: np.ndarray  # (N,)
    scores: np.ndarray  # (N,)
    foreground: np.ndarray  # (N,) share of each image that its mask leaves; NaN where there are no masks
    places: np.ndarray  # (N,) numbers of PLACE, ascending
    kinds: frozenset[str]  # of their noise

    def __len__(self) -> int:
        return len(self.scores)

    def only(self, chosen: np.ndarray) -> Images:
        columns = (self.concepts, self.prompts, self.scores, self.foreground, self.places)
        concepts, prompts, scores, foreground, places = (column[chosen] for column in columns)
        return Images(concepts, prompts, scores, foreground, places, self.kinds)


@dataclass(frozen=True)
class Difference:
    """The mean of one variant less that of another, and what it is over."""

    pairing: str
    one: Images  # those that were compared
    other: Images
    left_out: tuple[int, int]  # images of either that were not
    estimate: Estimate | None  # None: they share no concept

    @property
    def images(self) -> int:
        """Pairs of images; where images are no pairs, those of the variant with fewer."""
        return min(len(self.one), len(self.other))

    @property
    def prompts(self) -> int:
        """How many different ones."""
        return len(np.union1d(self.one.prompts, self.other.prompts))

    @property
    def concepts(self) -> int:
        return len(np.unique(self.one.concepts))


def images_of(cells: pl.DataFrame) -> dict[str, Images]:
    """Variant -> its images, with numbers in common.

    cells: rows of one metric and encoder, with the columns of `PLACE`, variant, score and foreground.
    """
    places = cells.select(PLACE).unique().sort(PLACE).with_row_index("place")
    numbered = cells.join(places, on=PLACE).sort("place").with_columns(concept_number=pl.col("concept").rank("dense"))
    return {
        str(variant): Images(
            concepts=own["concept_number"].to_numpy(),
            prompts=own["prompt_number"].to_numpy(),
            scores=own["score"].to_numpy(),
            foreground=own["foreground"].to_numpy(),
            places=own["place"].to_numpy(),
            kinds=frozenset(own["kind"].unique()),
        )
        for (variant,), own in numbered.partition_by("variant", as_dict=True, maintain_order=True).items()
    }


def compare(
    one: Images,
    other: Images,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
    cautious: bool = False,
    noise: Callable[[Images], Noise | None] = lambda compared: None,
) -> Difference:
    """The mean of `one` less that of `other`, with its interval.

    Args:
        draws, seed, level, cautious: as `statistics.estimate` takes them.
        noise: of the images of `one` that are compared: what is added to the variance.
    """
    here = one.kinds == other.kinds == {HERE}
    common = np.intersect1d(one.places, other.places, assume_unique=True)
    ours, theirs = (each.only(np.isin(each.places, common, assume_unique=True)) for each in (one, other))
    left_out = (len(one) - len(ours), len(other) - len(theirs))
    ours_there, theirs_there = _with_common(one, other, lambda each: each.concepts)
    if here or _enough(ours, ours_there, theirs, theirs_there):
        found = None
        if len(common):
            found = statistics.estimate(
                ours.concepts, ours.prompts, ours.scores - theirs.scores,
                draws=draws, seed=seed, level=level, noise=noise(ours), cautious=cautious,
            )  # fmt: skip
        return Difference(BY_NOISE if here else BY_SEED, ours, theirs, left_out, found)
    ours, theirs = _with_common(one, other, lambda each: each.concepts.astype(np.int64) * 2**32 + each.prompts)
    if _enough(ours, ours_there, theirs, theirs_there):
        concepts, prompts, means = statistics.cell_means(ours.concepts, ours.prompts, ours.scores)
        subtracted = statistics.cell_means(theirs.concepts, theirs.prompts, theirs.scores)[2]  # of the same cells
        found = statistics.estimate(
            concepts, prompts, means - subtracted,
            draws=draws, seed=seed, level=level, noise=noise(ours), cautious=cautious,
        )  # fmt: skip
        return Difference(BY_PROMPT, ours, theirs, (len(one) - len(ours), len(other) - len(theirs)), found)
    ours, theirs = ours_there, theirs_there
    found = None
    if len(ours):
        sides = [(each.concepts, each.prompts, each.scores) for each in (ours, theirs)]
        found = statistics.estimate_unpaired(*sides, level=level, noise=noise(ours))
    return Difference(UNPAIRED, ours, theirs, (len(one) - len(ours), len(other) - len(theirs)), found)


def _enough(ours: Images, one: Images, theirs: Images, other: Images) -> bool:
    return len(ours) > 0 and len(ours) >= LEAST * len(one) and len(theirs) >= LEAST * len(other)


def _with_common(one: Images, other: Images, key: Callable[[Images], np.ndarray]) -> tuple[Images, Images]:
    """The images of either whose key some image of the other has too."""
    keys = key(one), key(other)
    return one.only(np.isin(keys[0], keys[1])), other.only(np.isin(keys[1], keys[0]))
