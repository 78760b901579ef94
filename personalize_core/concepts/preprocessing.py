"""How concept images are prepared for training: plain configuration that needs no image library to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preprocessing:
    """How a concept image becomes square training images.

    Latents are made once and cached, so the random choices of training are enumerated here, in equally likely
    views: a random crop becomes `CROPS` evenly spaced positions along the longer side, a random flip two images, a
    random rotation or zoom `ROTATIONS` or `ZOOMS` images with evenly spaced angles or sizes. Deviates from the
    papers only in that: any of their crops lies within an eighth of the slack from one of ours, any of their
    angles within 2 degrees. The first view is always the concept image as it stands.
    """

    # "squash": straight to a square; "centre": the middle square; "crop": shorter side to size, then a square crop;
    # "rotate": three quarters turned by up to 45 degrees, then "crop" (AttnDreamBooth); "zoom": Custom Diffusion's
    geometry: Literal["squash", "centre", "crop", "rotate", "zoom"]
    interpolation: Literal["bicubic", "bilinear"]
    flip: bool  # half of the rows are mirrored; a quarter with "rotate"

    @property
    def key(self) -> str:
        """Names the folder of the cached latents."""
        return f"{self.geometry}-{self.interpolation}" + ("-flip" if self.flip else "")

    @property
    def of_class_images(self) -> Preprocessing:
        """How images of the class noun are prepared beside them: alike, but never zoomed."""
        return Preprocessing("centre", self.interpolation, self.flip) if self.geometry == "zoom" else self


CENTRE_CROP = Preprocessing("crop", "bicubic", flip=False)  # what reference images are shown and compared in
