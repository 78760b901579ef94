"""Images of several concepts side by side: how much each part of an image looks like each concept.

No paper measures this. A score of the whole image could not distinguish two concepts half right from one that is
fully right and one that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from personalize_core.metrics.encoders import Encoder
from personalize_core.metrics.similarity import image_alignment_per_image


def windows(image: Image.Image, parts: int) -> list[list[Image.Image]]:
    """The image's `parts` equal columns from left to right, each as overlapping squares from top to bottom.

    Squares, since encoders see squares, and a whole column would be squeezed.
    """
    side = image.width // parts
    stops = max(2, -(-2 * image.height // side) - 1)  # neighbours share half of their height at least
    tops = [round(stop * (image.height - side) / (stops - 1)) for stop in range(stops)] if image.height > side else [0]
    return [[image.crop((part * side, top, part * side + side, top + side)) for top in tops] for part in range(parts)]


def identity_of_parts(
    images: Sequence[Image.Image], references: Sequence[Sequence[Image.Image]], encoder: Encoder
) -> Tensor:
    """How much each column of each image looks like each concept.

    Args:
        images: B images, each of n concepts from left to right.
        references: n lists of concept images, one per concept.

    Returns:
        (B, n, n) float64: of an image's column, in its best square, the mean cosine with a concept's images.
    """
    count = len(references)
    cut = [windows(image, count) for image in images]
    squares = encoder.images([square for columns in cut for column in columns for square in column])
    known = [encoder.images(list(concept_images)) for concept_images in references]
    alike = [image_alignment_per_image(squares, one, encoder.looks_for) for one in known]
    return torch.stack(alike, dim=-1).view(len(images), count, -1, count).amax(dim=2)
