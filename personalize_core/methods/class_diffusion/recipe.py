"""ClassDiffusion's recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, Recipe, options
from personalize_core.methods.shared.options import LAG


@options
class Config(Recipe):
    """Keys and values of every cross-attention layer and one embedding, which is held near the class noun's meaning.

    Numbers are those of the authors' launcher for one concept on Stable Diffusion 1.5, on one card: a rate of 1e-5,
    scaled by its batch of 2.
    """

    display_name = "ClassDiffusion"
    learns = "keys and values of the cross-attention, one embedding"
    authors = "Huang et al."
    title = "ClassDiffusion: More Aligned Personalization Tuning with Explicit Class Guidance"
    venue = "ICLR 2025"
    arxiv = "2405.17532"
    Sampling = LAG

    spl_weight: Annotated[float, Field(ge=0)] = 1.0  # lambda, of the semantic preservation loss
    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 2
    lr: Annotated[float, Field(gt=0)] = 2e-5

    ablations = {"without_spl": Ablation({"spl_weight": 0.0}, "ClassDiffusion without its loss")}

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=True)

    @property
    def text_embeddings(self) -> int:
        return 1

    @property
    def samples_by_weights(self) -> bool:
        return True
