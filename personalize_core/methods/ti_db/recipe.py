"""TI+DB's recipe: Textual Inversion and DreamBooth at once, the joint baseline of AttnDreamBooth.

The appendix of AttnDreamBooth's paper gives the optimizer's settings and no code; prompt and initial embedding are not
stated there, so they are AttnDreamBooth's own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.methods.recipe import options
from personalize_core.methods.shared.options import EmbeddingAndUNetRecipe, TokenRule


@options
class Config(EmbeddingAndUNetRecipe):
    """The placeholder's embedding and every weight of the U-Net, trained together; no prior preservation.

    Defaults are the paper's (appendix A), for Stable Diffusion 2.1-base: AttnDreamBooth's steps and batch.
    """

    display_name = "TI+DB"
    learns = "one embedding and the U-Net, together"
    authors = "Pang et al."
    title = "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation"
    venue = "NeurIPS 2024"
    arxiv = "2406.05000"

    steps: Annotated[int, Field(gt=0)] = 660  # 60 + 100 + 500
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0)] = 2e-6
    # One rate for both is the point of this baseline: the embedding hardly moves (a cosine of 0.9997 to its start).
    lr_embedding: Annotated[float, Field(gt=0)] | None = None  # a rate of the embedding's own; `lr` if None
    class_token_rule: TokenRule = "last"  # the embedding starts from this token of the class noun
    rotate: bool = True  # AttnDreamBooth's code rotates and mirrors concept images; its paper does not say so
