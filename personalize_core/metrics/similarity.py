"""Alignment scores: how alike two sets of features are. Cosines in [-1, 1], higher is more alike.

All return float64 and take features of any norm. Definitions after Gal et al. 2022 (CLIP-T,
CLIP-I), Ruiz et al. 2023 (DINO, the average over pairs) and Hessel et al. 2021 (CLIPScore's factor).

`looks_for` is an encoder's, see `encoders.Encoder`: with it a row of zeros is an image in which nothing of the kind was
found. Such an image is unlike all others, and no image is compared with it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from personalize_core.errors import InputError

CLIPSCORE_FACTOR = 2.5  # w in eq. 1 of Hessel et al. 2021; the CustomConcept101 script applies it to CLIP-T


def image_alignment_per_image(generated: Tensor, references: Tensor, looks_for: str | None = None) -> Tensor:
    """Mean cosine of each generated image with every reference image.

    CLIP-I and DINO differ only in the encoder that made the features. It is not the best match, so varied
    references pull it down. A generated image that is a copy of a reference does count that pair.

    Args:
        generated: (G, D) image features.
        references: (R, D) features of the concept's training images, from the same encoder.
        looks_for: with it a generated image of zeros has 0, and a reference of zeros is left out of R.

    Returns:
        (G,). Its mean is the mean over all G * R pairs.

    Raises:
        InputError: all references are zeros, with looks_for.
    """
    generated, references = directions(generated, "generated", looks_for), with_something(references, looks_for)
    check_widths(generated, "generated", references, "reference")
    return (generated @ references.T).clamp(-1, 1).mean(dim=1)


def image_alignment(generated: Tensor, references: Tensor) -> Tensor:
    """Mean cosine over all G * R pairs; a scalar. See image_alignment_per_image."""
    return image_alignment_per_image(generated, references).mean()


def real_alignment_per_image(references: Tensor) -> Tensor:
    """Mean cosine of each reference image with every *other* one (i != j): what a perfect method might reach.

    Not a strict ceiling: images that copy one reference, or the average of them, can score higher.

    Args:
        references: (R, D) with R of at least 2; one image has nothing to be compared with.

    Returns:
        (R,). Its mean is the mean over all R * (R - 1) ordered pairs.
    """
    references = directions(references, "reference")
    if len(references) < 2:
        raise ValueError("real images are compared with each other, so there must be at least 2, not 1")
    cosines = (references @ references.T).clamp(-1, 1)
    return cosines.fill_diagonal_(0).sum(dim=1) / (len(references) - 1)


def real_alignment(references: Tensor) -> Tensor:
    """Mean cosine over all ordered pairs i != j of reference images; a scalar."""
    return real_alignment_per_image(references).mean()


def text_alignment_per_image(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image with the text it was sampled for (CLIP-T, plain).

    Args:
        images: (N, D) image features.
        texts: (N, D), row i belonging to image i; or (1, D), one text for all of them.

    Returns:
        (N,). Published CLIP-T near 0.23 to 0.31 is on this scale.
    """
    images, texts = directions(images, "image"), directions(texts, "text")
    check_widths(images, "image", texts, "text")
    if len(texts) not in (1, len(images)):
        raise ValueError(f"there are {len(images)} images and {len(texts)} texts: give one text, or one for each image")
    return (images * texts).sum(dim=1).clamp(-1, 1)


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Mean cosine of images with their texts; a scalar. See text_alignment_per_image."""
    return text_alignment_per_image(images, texts).mean()


def clip_score(cosines: Tensor) -> Tensor:
    """CLIPScore, 2.5 * max(cosine, 0), in [0, 2.5]; same shape as given.

    Published CLIP-T near 0.7 to 0.8 is on this scale. Take it per image, before averaging: the maximum and the
    mean do not commute.
    """
    return CLIPSCORE_FACTOR * cosines.clamp(min=0)


def drift_per_image(after: Tensor, before: Tensor, looks_for: str | None = None) -> Tensor:
    """(N,): 1 - cosine of each image with the one before it; both (N, D).

    looks_for: with it two images of zeros, in which nothing of the kind was found, have drifted by 0.
    """
    after, before = directions(after, "image", looks_for), directions(before, "earlier image", looks_for)
    check_widths(after, "image", before, "earlier image")
    neither = ~after.any(dim=1) & ~before.any(dim=1)
    return (1 - (after * before).sum(dim=1).clamp(-1, 1)).masked_fill(neither, 0)


def with_something(references: Tensor, looks_for: str | None) -> Tensor:
    """(R, D) features of references to float64 rows of length one; with looks_for, those alone that are not zeros.

    Raises:
        InputError: none is left.
    """
    references = directions(references, "reference", looks_for)
    some = references[references.any(dim=1)]
    if not len(some):
        raise InputError(f"no {looks_for} is found in any of the {len(references)} concept images to compare with")
    return some


def directions(features: Tensor, what: str, looks_for: str | None = None) -> Tensor:
    """(N, D) features of any norm to float64 rows of length one; raise where a cosine would mean nothing.

    looks_for: with it rows of zeros stay zeros.
    """
    if features.ndim != 2:
        raise ValueError(f"{what} features have shape {tuple(features.shape)}; expected (N, D)")
    if not len(features):
        raise ValueError(f"there are no {what} features to compare")
    features = features.double()
    lengths = features.norm(dim=1)
    unusable = ~(lengths.isfinite() & ((lengths > 0) | (looks_for is not None)))
    if unusable.any():
        row = int(unusable.nonzero()[0])
        raise ValueError(f"row {row} of the {what} features is zero or not finite, so it has no direction")
    return F.normalize(features, dim=1)


def check_widths(a: Tensor, what_a: str, b: Tensor, what_b: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{what_a} features have width {a.shape[1]}, {what_b} features {b.shape[1]}: "
            "they come from different encoders"
        )
