"""AttnDreamBooth's recipe.

Where paper and released code differ we follow the code, since the recipe was tuned with it; the paper's readings are
`reg_pool: all` and `rotate: false`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from personalize_core.base_model.layers import Pool
from personalize_core.errors import InputError
from personalize_core.methods.recipe import NOTHING_INSIDE, Ablation, options, refuse_idle
from personalize_core.methods.shared.options import EmbeddingAndUNetRecipe, PriorPreservationRecipe, TokenRule

Steps = Annotated[int, Field(ge=0)]
BatchSize = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

STAGES = ("embedding", "attention", "unet")
CROSS_ATTENTION = {"lag": "without its last stage it changes the cross-attention alone, for which LAG is not built"}


@options
class Sampling:
    """How a trained artifact is used."""

    # For analyses stage by stage.
    after_stage: Annotated[
        Literal["embedding", "attention", "unet"], Field(description="takes the weights as they were after that stage")
    ] = "unet"


@options
class Config(PriorPreservationRecipe, EmbeddingAndUNetRecipe):
    """The embedding, then the cross-attention, then the whole U-Net, each kept near how the class noun is attended.

    Defaults are the paper's, with which its script agrees, for Stable Diffusion 2.1-base. A stage of 0 steps is left
    out, and the others stay as they are.
    """

    display_name = "AttnDreamBooth"
    learns = "one embedding; the cross-attention; the U-Net"
    authors = "Pang et al."
    title = "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation"
    venue = "NeurIPS 2024"
    arxiv = "2406.05000"
    Sampling = Sampling

    embedding_steps: Steps = 60
    embedding_batch_size: BatchSize = 8
    embedding_lr: Rate = 1e-3
    embedding_mean_weight: Weight = 0.1  # lambda_mu of eq. 2
    embedding_variance_weight: Weight = 0.0  # lambda_sigma of eq. 2

    attention_steps: Steps = 100
    attention_batch_size: BatchSize = 8
    attention_lr: Rate = 2e-5
    attention_mean_weight: Weight = 2.0
    attention_variance_weight: Weight = 5.0

    unet_steps: Steps = 500
    unet_batch_size: BatchSize = 8
    unet_lr: Rate = 2e-6
    unet_mean_weight: Weight = 2.0
    unet_variance_weight: Weight = 5.0

    # What the regularizer compares: mean and variance of both maps, or each value of one with the same of the other,
    # which the authors tried and rejected; that has mean_weight for its weight.
    constraint: Literal["statistics", "values"] = "statistics"
    reg_pool: Pool = "layer"  # see attention_penalty in method.py, also for the next
    reg_batch: Literal["sum", "mean"] = "sum"
    # The token of the class noun that the embedding starts from. The regularizer reads the maps of all of them, but
    # with "first", as the authors' code does, of that one alone.
    class_token_rule: TokenRule = "last"
    rotate: bool = True  # concept images rotated and mirrored: in the code, not in the paper
    # The authors leave it out, for identity; in the first stage, which trains no weights, it changes nothing.
    prior_preservation: bool = False
    prior_weight: Weight = 1.0  # lambda of DreamBooth's eq. 2
    class_images: Annotated[int, Field(gt=0)] = 200

    ablations = {
        "without_stage_1": Ablation({"embedding_steps": 0}),
        "without_stage_2": Ablation({"attention_steps": 0}),
        "without_stage_3": Ablation({"unet_steps": 0}),
        "without_regularizer": Ablation(
            {
                "embedding_mean_weight": 0.0,
                "embedding_variance_weight": 0.0,
                "attention_mean_weight": 0.0,
                "attention_variance_weight": 0.0,
                "unet_mean_weight": 0.0,
                "unet_variance_weight": 0.0,
            }
        ),
        # The paper's reading; the method itself is the code's.
        "pooled_regularizer": Ablation({"reg_pool": "all"}, "AttnDreamBooth with a pooled regularizer"),
        "regularizer_mean": Ablation({"reg_batch": "mean"}, "AttnDreamBooth with its regularizer's batch mean"),
        "without_rotation": Ablation({"rotate": False}),  # the paper's preprocessing, likewise
        "constrained_values": Ablation(
            {"constraint": "values"}, "AttnDreamBooth with its attention values constrained"
        ),
        "prior_preservation": Ablation({"prior_preservation": True}, "AttnDreamBooth with prior preservation"),
        "fast": Ablation(  # the authors'; for their base model
            {"unet_steps": 200, "unet_batch_size": 4, "unet_lr": 1e-5}, "AttnDreamBooth fast"
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self._trains(stage) for stage in STAGES):
            raise InputError(
                "embedding_steps, attention_steps and unet_steps are all 0, so nothing would be learned; "
                "give at least one stage some steps"
            )
        shape = (self.reg_pool, self.reg_batch, self.constraint)
        if not self._regularized and shape != ("layer", "sum", "statistics"):
            raise InputError(
                f"reg_pool = {shape[0]!r}, reg_batch = {shape[1]!r} and constraint = {shape[2]!r} shape the attention "
                "regularizer, which no stage has; take them out, or give a stage a mean_weight or a variance_weight"
            )
        if self.constraint == "values":
            refuse_idle(self, *(f"{stage}_variance_weight" for stage in STAGES), off="constraint: values")

    @property
    def lacks(self) -> Mapping[str, str]:
        if self.unet_steps:
            return super().lacks
        return CROSS_ATTENTION if self.attention_steps else NOTHING_INSIDE

    def check(self, sampling: Sampling) -> None:
        stage = sampling.after_stage
        if stage != "unet" and not self._trains(stage):  # "unet" is the end, whatever the last stage is
            raise InputError(
                f"after_stage: {stage} takes the weights as they were after a stage that was left out "
                f"({stage}_steps = 0); choose another stage"
            )

    def _trains(self, stage: str) -> bool:
        return getattr(self, f"{stage}_steps") > 0

    @property
    def _regularized(self) -> bool:
        kinds = ("mean", "variance") if self.constraint == "statistics" else ("mean",)
        trained = [stage for stage in STAGES if self._trains(stage)]
        return any(getattr(self, f"{stage}_{kind}_weight") for stage in trained for kind in kinds)
