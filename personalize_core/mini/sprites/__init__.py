"""The drawn things, as shading with alpha; `art.py` builds them, NOTICE names their authors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent


@cache
def load(sprite: str) -> tuple[np.ndarray, np.ndarray]:
    """Shade and alpha, (h, w) float32: shade is 0 at the body's own colour, -1 darkest, 1 lightest; alpha 0 to 1."""
    with Image.open(FOLDER / f"{sprite}.png", formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("LA")).astype(np.float32)
    return (pixels[..., 0] - 128) / 110, pixels[..., 1] / 255
