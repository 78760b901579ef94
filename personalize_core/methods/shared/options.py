"""Options that several recipes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from personalize_core.base_model.layers import Pool
from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Recipe, options, refuse_idle

TokenRule = Literal["last", "first", "mean"]
"""Which of a class noun's tokens stands for it. English heads come last ("stuffed animal"); AttnDreamBooth's and CoRe's
code takes the first."""

MinTimestep = Annotated[int, Field(ge=0, lt=1000)]
"""The first of the base model's thousand timesteps that a word is trained on.

With little noise the image itself tells what it shows, and whatever a word adds there disturbs: of a thing unlike all
that the base model saw, the empty prompt predicts the noise best. A small model's word then learns to add nothing. The
published methods train on all timesteps, which is 0.
"""

Unconditional = Literal["reuse", "off", "full"]
"""What the prompt-free half of guidance does under LAG, which the paper does not say: reuse the mask of the same
image's prompted half, have the change off, or have it act in full."""

Weight = Annotated[float, Field(ge=0)]
Axis = Literal["token", "feature"]
Reduction = Literal["sum", "mean"]


@options
class LAG:
    """The sampling options of a method that can be confined to the region that attends to its concept."""

    display_name: ClassVar[str] = "LAG"

    lag: Annotated[bool, Field(description="keeps what was learned to the region that looks at the concept")] = False
    lag_unconditional: Annotated[
        Unconditional, Field(description="says what lag does in the prompt-free half of guidance")
    ] = "reuse"

    def __post_init__(self) -> None:
        if self.lag_unconditional != "reuse" and not self.lag:
            raise InputError(
                f"lag_unconditional = {self.lag_unconditional!r} says what lag does, which is off; add `lag: true`"
            )


@options
class ContextLosses:
    """How CoRe's two losses are computed. Defaults are the released code's, with which the paper's weights were tuned.

    See methods/shared/context_regularizer.py.
    """

    cer_weight: Weight = 1.5e-4  # lambda_emb
    car_weight: Weight = 0.05  # lambda_attn
    cer_axis: Axis = "token"  # see context_embedding_loss; the paper's is "feature"
    car_pool: Pool = "layer"  # see context_attention_loss; the paper's is "all"
    car_batch: Reduction = "sum"

    def __post_init__(self) -> None:
        if self.cer_axis != "token" and not self.cer_weight:
            raise InputError(
                f"cer_axis = {self.cer_axis!r} shapes the context embedding loss, which is off; take it out, or give "
                "cer_weight a value above 0"
            )
        if (self.car_pool, self.car_batch) != ("layer", "sum") and not self.car_weight:
            raise InputError(
                f"car_pool = {self.car_pool!r} and car_batch = {self.car_batch!r} shape the context attention loss, "
                "which is off; take them out, or give car_weight a value above 0"
            )


@options
class Refinement(ContextLosses):
    """Test-time optimization; defaults are the paper's and the code's for Stable Diffusion 2.1-base."""

    display_name: ClassVar[str] = "test-time optimization"

    steps: Annotated[int, Field(gt=0)] = 10
    batch_size: Annotated[int, Field(gt=0)] = 6
    lr: Annotated[float, Field(gt=0)] = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.cer_weight or self.car_weight):
            raise InputError("cer_weight and car_weight are both 0, so test-time optimization would refine nothing")


@options
class PersonalizationGuidance:
    """Guidance whose prompt-free half comes from weights between the base model's and those that were learned.

    The paper tunes both numbers of a sampling run, omega and the scale of guidance; its values were not at hand.
    """

    display_name: ClassVar[str] = "personalization guidance"

    omega: Annotated[float, Field(ge=0, le=1)] = 0.5  # 0: the base model's weights; 1: the learned, as ever


@options
class ConsistencyGuidance:
    """The base model's guidance, and a step towards what was learned; the scale is that of DCO's README."""

    display_name: ClassVar[str] = "consistency guidance"

    scale: Annotated[float, Field(ge=0)] = 3.0  # omega_rg


WeightGuidance = PersonalizationGuidance | ConsistencyGuidance

STRATEGY_NAMES = {
    "lag": LAG.display_name,
    "tto": Refinement.display_name,
    "pg": PersonalizationGuidance.display_name,
    "cg": ConsistencyGuidance.display_name,
}
"""What comes behind a method's name and "_" in the name of a variant -> what people call it."""

WHOLE_UNET = {"lag": "it changes the whole U-Net, and between the transformers no location looks at words"}
"""Why a method that trains all weights has no LAG; for `Recipe.lacks`."""


class PriorPreservationRecipe(Recipe):
    """What recipes have in common whose training can preserve the prior of the class noun (DreamBooth, eq. 2)."""

    prior_preservation: bool
    prior_weight: float
    class_images: int

    def __post_init__(self) -> None:
        if not self.prior_preservation:
            refuse_idle(self, "prior_weight", "class_images", off="prior_preservation: false")

    @property
    def class_images_needed(self) -> int:
        return self.class_images if self.prior_preservation else 0


class EmbeddingAndUNetRecipe(Recipe):
    """What recipes have in common that learn the placeholder's embedding and weights of the U-Net."""

    rotate: bool  # whether concept images are rotated and mirrored

    @property
    def lacks(self) -> Mapping[str, str]:
        return WHOLE_UNET

    @property
    def samples_by_weights(self) -> bool:
        return True

    @property
    def text_embeddings(self) -> int:
        return 1

    @property
    def preprocessing(self) -> Preprocessing:
        if self.rotate:
            return Preprocessing("rotate", "bilinear", flip=True)
        return Preprocessing("crop", "bilinear", flip=False)
