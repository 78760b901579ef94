"""The recipe of DreamBooth by low-rank adaptation (LoRA), by default of the attention projections.

The paper is about language models; the recipe is diffusers' DreamBooth LoRA example.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import options
from personalize_core.methods.shared.options import LAG, PriorPreservationRecipe

Target = Literal["attention", "feed_forward", "projections", "text_encoder"]


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
    # Of every transformer of the U-Net: the attention, the feed-forward layers, proj_in and proj_out; and the attention
    # and feed-forward layers of the text encoder. kohya's trainers change all four, diffusers' script the first.
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("attention",)
    prior_preservation: bool = False
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    class_images: Annotated[int, Field(gt=0)] = 200
    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 1  # as many class images come on top, with prior preservation
    lr: Annotated[float, Field(gt=0)] = 1e-4

    @property
    def needs_one_text_encoder(self) -> str:
        return (
            "which layers of its two text encoders the target text_encoder should mean is open"
            if "text_encoder" in self.targets
            else ""
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets names one twice: {', '.join(self.targets)}")

    def check(self, sampling: LAG) -> None:
        """LAG confines changes of the U-Net to a region; what the text encoder says acts everywhere."""
        if sampling.lag and "text_encoder" in self.targets:
            raise InputError(
                "lag keeps what was learned to the region that looks at the concept, and a change to the text encoder "
                "acts everywhere; sample without lag, or leave text_encoder out of the targets"
            )

    @property
    def samples_by_weights(self) -> bool:
        return "text_encoder" not in self.targets  # whose change stands beside the weights

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)
