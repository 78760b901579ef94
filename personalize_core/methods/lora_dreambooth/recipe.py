"""The recipe of DreamBooth by low-rank adaptation (LoRA) of the attention projections.

The paper is about language models; the recipe is diffusers' DreamBooth LoRA example.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import options
from personalize_core.methods.shared.options import LAG, PriorPreservationRecipe


@options
class Config(PriorPreservationRecipe):
    """A low-rank change to every attention projection of the U-Net; the placeholder reads a rare word's embedding.

    Defaults are diffusers' recipe, for Stable Diffusion 1.5. Its alpha is the rank, so that nothing is scaled.
    """

    display_name = "LoRA-DreamBooth"
    learns = "a low-rank change to each attention projection"
    authors = "Hu et al."
    title = "LoRA: Low-Rank Adaptation of Large Language Models"
    venue = "ICLR 2022"
    arxiv = "2106.09685"
    Sampling = LAG

    rank: Annotated[int, Field(gt=0)] = 4
    prior_preservation: bool = False
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    class_images: Annotated[int, Field(gt=0)] = 200
    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 1  # as many class images come on top, with prior preservation
    lr: Annotated[float, Field(gt=0)] = 1e-4

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)
