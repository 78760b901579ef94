"""Directional Textual Inversion's recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, Recipe, options
from personalize_core.methods.shared.options import MinTimestep, TokenRule


@options
class Config(Recipe):
    """The direction of one input embedding, read in the placeholder's place; its norm stays that of the vocabulary.

    Defaults are those of the authors' launcher for Stable Diffusion XL: a rate of 1e-2, scaled by its batch of 4.
    """

    display_name = "DTI"
    learns = "the direction of one embedding"
    authors = "Kim et al."
    title = "Directional Textual Inversion for Personalized Text-to-Image Generation"
    venue = "ICLR 2026"
    arxiv = "2512.13672"

    steps: Annotated[int, Field(gt=0)] = 400
    batch_size: Annotated[int, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0)] = 4e-2  # the tangent of the angle that each step turns the embedding by
    kappa: Annotated[float, Field(ge=0)] = 1e-4  # concentration of the prior; without one, 0
    norm: Literal["mean", "initial"] = "mean"  # of the vocabulary's embeddings, or of the one that it starts from
    min_timestep: MinTimestep = 0
    templates: str = "ti_object_27"  # training prompts; the concept alone stands in their slot
    class_token_rule: TokenRule = "last"  # the embedding starts in the direction of this token of the class noun

    ablations = {"without_prior": Ablation({"kappa": 0.0}, "DTI without the prior")}

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bicubic", flip=False)

    @property
    def text_embeddings(self) -> int:
        return 1
