"""The recipe of Direct Consistency Optimization (DCO)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, Recipe, options
from personalize_core.methods.shared.options import LAG, TokenRule


@options
class Config(Recipe):
    """A low-rank change to every attention projection and one embedding, by a preference over the base model.

    Numbers are those of the authors' README for a subject on Stable Diffusion XL; the batch of 1 is not said there.
    """

    display_name = "DCO"
    learns = "a low-rank change to each attention projection, one embedding"
    authors = "Lee et al."
    title = "Direct Consistency Optimization for Robust Customization of Text-to-Image Diffusion Models"
    venue = "NeurIPS 2024"
    arxiv = "2402.12004"
    Sampling = LAG

    rank: Annotated[int, Field(gt=0)] = 32
    # How strongly it holds to the base model; 0 minimizes the diffusion loss instead, as DreamBooth does.
    beta: Annotated[float, Field(ge=0)] = 1000.0
    class_token_rule: TokenRule = "last"  # the embedding starts from this token of the class noun
    steps: Annotated[int, Field(gt=0)] = 2000
    batch_size: Annotated[int, Field(gt=0)] = 1
    lr: Annotated[float, Field(gt=0)] = 5e-5
    embedding_lr: Annotated[float, Field(gt=0)] = 5e-6

    ablations = {"diffusion_loss": Ablation({"beta": 0.0}, "DCO with the diffusion loss")}

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)

    @property
    def text_embeddings(self) -> int:
        return 1

    @property
    def samples_by_weights(self) -> bool:
        return True
