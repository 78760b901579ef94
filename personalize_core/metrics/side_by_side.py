"""Pictures of several concepts side by side: how much each part of a picture looks like each concept.

Ours; no paper measures it. The whole picture's score would not tell two half-right things from one right thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from personalize_core.metrics.features import Encoder
from personalize_core.metrics.similarity import image_alignment_per_image

Picture = Image.Image


def windows(picture: Picture, parts: int) -> list[list[Picture]]:
    """The picture's `parts` equal columns from left to right, each as overlapping squares from top to bottom.

    Squares, since encoders see squares, and a whole column would be squeezed.
    """
    side = picture.width // parts
    stops = max(2, -(-2 * picture.height // side) - 1)  # neighbours share half of their height at least
    tops = (
        [round(stop * (picture.height - side) / (stops - 1)) for stop in range(stops)] if picture.height > side else [0]
    )
    return [[picture.crop((part * side, top, part * side + side, top + side)) for top in tops] for part in range(parts)]


def identity_of_parts(pictures: Sequence[Picture], references: Sequence[Sequence[Picture]], encoder: Encoder) -> Tensor:
    """How much each column of each picture looks like each concept.

    Args:
        pictures: B pictures, each of n concepts from left to right.
        references: n lists of photographs, one per concept.

    Returns:
        (B, n, n) float64: of a picture's column, in its best square, the mean cosine with a concept's photographs.
    """
    count = len(references)
    cut = [windows(picture, count) for picture in pictures]
    squares = encoder.images([square for columns in cut for column in columns for square in column])
    alike = [image_alignment_per_image(squares, encoder.images(list(photographs))) for photographs in references]
    return torch.stack(alike, dim=-1).view(len(pictures), count, -1, count).amax(dim=2)
