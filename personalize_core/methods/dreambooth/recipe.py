"""DreamBooth's recipe, with and without prior preservation.

The paper's model is Imagen, and no code for it is known to us; for Stable Diffusion we follow diffusers' recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, options
from personalize_core.methods.shared.options import WHOLE_UNET, PriorPreservationRecipe


@options
class Config(PriorPreservationRecipe):
    """Every weight of the U-Net, and optionally of the text encoder; the placeholder reads a rare token's embedding.

    Defaults are diffusers' recipe with prior preservation, for Stable Diffusion 1.4. Its recipe without prior
    preservation is 400 steps.
    """

    display_name = "DreamBooth"
    learns = "the U-Net"
    authors = "Ruiz et al."
    title = "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation"
    venue = "CVPR 2023"
    arxiv = "2208.12242"

    prior_preservation: bool = True
    prior_weight: Annotated[float, Field(ge=0)] = 1.0  # lambda of eq. 2
    class_images: Annotated[int, Field(gt=0)] = 200
    train_text_encoder: bool = False
    steps: Annotated[int, Field(gt=0)] = 800
    batch_size: Annotated[int, Field(gt=0)] = 1  # as many class images come on top
    lr: Annotated[float, Field(gt=0)] = 5e-6

    ablations = {
        "without_prior": Ablation(
            {"prior_preservation": False, "prior_weight": 1.0, "class_images": 200},
            "DreamBooth without prior preservation",
        ),
        "text_encoder": Ablation({"train_text_encoder": True}, "DreamBooth with a trained text encoder"),
        # As Personalized Residuals compares with it: XavierXiao's port; for its base model.
        "residuals_baseline": Ablation(
            {
                "train_text_encoder": True,
                "prior_weight": 1.0,
                "steps": 800,
                "batch_size": 1,
                "lr": 1e-6,
                "class_images": 200,
            },
            "DreamBooth as Personalized Residuals' baseline",
        ),
    }

    @property
    def needs_one_text_encoder(self) -> str:
        return "training its text encoders whole has no published form" if self.train_text_encoder else ""

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)

    @property
    def samples_by_weights(self) -> bool:
        return True

    @property
    def lacks(self) -> Mapping[str, str]:
        return WHOLE_UNET
