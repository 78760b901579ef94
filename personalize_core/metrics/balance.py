"""The balance of identity and text alignment: the one number that a search maximises.

A recipe that learns more of a concept follows the prompt less, so neither score alone may choose a recipe. Of an image

    balance = sqrt(max(DINO, 0) * max(CLIP-T, 0))

the geometric mean: an image that lacks either has 0, and a gain in one counts as much as the same relative gain in the
other. Both are the tables' own, by the headline encoders: DINO with the concept images (those held out, where some
are), CLIP-T with the class noun in the prompt's slot. Images whose identity the protocol does not score are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from personalize_core.errors import InputError
from personalize_core.metrics import pairing, statistics, summaries, tables
from personalize_core.metrics.statistics import Estimate, Noise

IDENTITY, TEXT = "dino", "clip_t"


@dataclass(frozen=True)
class Means:
    """Of one concept: over a prompt's images, then over its prompts."""

    balance: float
    identity: float
    text: float


def balance_of(identity: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(N,), of the cosines (N,) of each image."""
    return np.sqrt(np.clip(identity, 0, None) * np.clip(text, 0, None))


def per_image(scores: pl.DataFrame) -> pl.DataFrame:
    """A row for each image that has both scores: `identity`, `text` and, in place of its score, its balance.

    scores: a table of scores of one method, of one concept or several.

    Raises:
        InputError: the table lacks either metric.
    """
    names = scores["metric"].unique()
    identity = tables.shown(IDENTITY, names.to_list())
    own = scores.filter(pl.col("headline") & pl.col("prompt_index").is_not_null())
    of_text, of_identity = own.filter(metric=TEXT), own.filter(metric=identity)
    if of_text.is_empty() or of_identity.is_empty():
        raise InputError(
            "the balance of identity and text alignment needs CLIP-T and DINO; write the text class_phrase and an "
            "identity encoder into params.yaml, section encoders, or into the protocol"
        )
    found = of_text.join(
        of_identity.select("variant", *tables.CELL, identity="score"), on=["variant", *tables.CELL], how="inner"
    )
    balance = balance_of(found["identity"].to_numpy(), found["score"].to_numpy())
    return found.with_columns(text="score", score=pl.Series(balance)).sort("variant", *tables.CELL)


def means(images: pl.DataFrame) -> Means:
    """images: what `per_image` returned, of one concept."""
    columns = ["score", "identity", "text"]
    prompts = images.group_by("prompt_index").agg(pl.col(columns).mean()).sort("prompt_index")
    return Means(*(float(prompts[column].to_numpy().mean()) for column in columns))


def estimate(images: pl.DataFrame) -> Estimate:
    """The mean balance over concepts, with its interval. images: what `per_image` returned, of all concepts."""
    found = summaries.estimate_of(summaries.with_prompts(images), "score", statistics.DRAWS, 0)
    return found.within(*range_of("score"))


def range_of(what: str, differences: int = 0) -> tuple[float, float]:
    """As `tables.range_of`, of a column of `per_image`."""
    if what != "score":
        return tables.range_of({"identity": IDENTITY, "text": TEXT}[what], differences)
    return (-1.0, 1.0) if differences else (0.0, 1.0)


def difference(
    found: pl.DataFrame, today: pl.DataFrame, what: str = "score", noise: Noise | None = None
) -> Estimate | None:
    """The mean balance of one recipe less that of another, paired image by image, with its interval over concepts.

    None: they share no image.

    Args:
        found, today: what `per_image` returned, of the same concepts.
        what: or "identity", "text": of these scores.
        noise: of training, added where there are too few concepts for an interval over them: over three or more, each
            trained anew, the concepts' spread holds it.
    """
    sides = (("found", found), ("today", today))
    both = pl.concat([images.with_columns(variant=pl.lit(name), score=what) for name, images in sides])
    images = pairing.images_of(summaries.with_prompts(both))
    few = len(np.unique(images["found"].concepts)) < statistics.FEWEST_CONCEPTS
    compared = pairing.compare(images["found"], images["today"], noise=lambda ours: noise if few else None)
    return compared.estimate and compared.estimate.within(*range_of(what, differences=1))
