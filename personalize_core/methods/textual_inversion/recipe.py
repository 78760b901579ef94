"""Textual Inversion's recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, Recipe, options
from personalize_core.methods.shared.options import MinTimestep, TokenRule


@options
class Config(Recipe):
    """One input embedding, read in the placeholder's place; nothing else is trained.

    Defaults are diffusers' recipe for Stable Diffusion 1.5: 5e-4, scaled by its 4 accumulation steps.
    """

    display_name = "Textual Inversion"
    learns = "one embedding"
    authors = "Gal et al."
    title = "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion"
    venue = "ICLR 2023"
    arxiv = "2208.01618"

    steps: Annotated[int, Field(gt=0)] = 3000
    batch_size: Annotated[int, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0)] = 2e-3
    min_timestep: MinTimestep = 0
    templates: str = "ti_object_27"  # training prompts; the concept alone stands in their slot
    class_token_rule: TokenRule = "last"  # the embedding starts from this token of the class noun

    ablations = {
        "official": Ablation(  # the authors' config, on one card
            {"steps": 6100, "batch_size": 2, "lr": 1e-2, "min_timestep": 0, "templates": "ti_object_81"},
            "Textual Inversion by the authors' config",
        ),
    }

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("squash", "bicubic", flip=True)

    @property
    def text_embeddings(self) -> int:
        return 1
