"""AttnDreamBooth.

Pang et al., "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", NeurIPS 2024,
arXiv:2406.05000. Equation numbers below are that paper's. Where paper and released code differ we follow the code,
since the recipe was tuned with it; the paper's readings are `reg_pool: all` and `rotate: false`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from personalize_core.base_model.attention import Pool
from personalize_core.base_model.model import LAYERS, BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods.interface import Method, Stage, Step, options
from personalize_core.methods.shared.parts import (
    ConceptEmbedding,
    EmbeddingAndUNet,
    KeptWeights,
    TokenRule,
    TunedWeights,
    class_embedding,
    parameter_names,
)

Steps = Annotated[int, Field(ge=0)]
Rows = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

CROSS_ATTENTION = {"lag": "without its last stage it changes the cross-attention alone, for which LAG is not built"}


@options
class Config:
    """Defaults are the paper's, with which its script agrees, for Stable Diffusion 2.1-base.

    A stage of 0 steps is left out, and the others stay as they are. The authors' "fast" recipe is unet_steps 200,
    unet_batch_size 4 and unet_lr 1e-5.
    """

    embedding_steps: Steps = 60
    embedding_batch_size: Rows = 8
    embedding_lr: Rate = 1e-3
    embedding_mean_weight: Weight = 0.1  # lambda_mu of eq. 2
    embedding_variance_weight: Weight = 0.0  # lambda_sigma of eq. 2

    attention_steps: Steps = 100
    attention_batch_size: Rows = 8
    attention_lr: Rate = 2e-5
    attention_mean_weight: Weight = 2.0
    attention_variance_weight: Weight = 5.0

    unet_steps: Steps = 500
    unet_batch_size: Rows = 8
    unet_lr: Rate = 2e-6
    unet_mean_weight: Weight = 2.0
    unet_variance_weight: Weight = 5.0

    reg_pool: Pool = "layer"  # see attention_penalty, also for the next
    reg_batch: Literal["sum", "mean"] = "sum"
    # The token of the class noun that the embedding starts from. The regularizer looks at all of them, but with
    # "first", as the authors' code does, at that one alone.
    class_token_rule: TokenRule = "last"
    rotate: bool = True  # concept images turned and mirrored: in the code, not in the paper

    def __post_init__(self) -> None:
        if not any((self.embedding_steps, self.attention_steps, self.unet_steps)):
            raise InputError(
                "embedding_steps, attention_steps and unet_steps are all 0, so nothing would be learned; "
                "give at least one stage some steps"
            )
        weights = (
            self.embedding_steps and (self.embedding_mean_weight or self.embedding_variance_weight),
            self.attention_steps and (self.attention_mean_weight or self.attention_variance_weight),
            self.unet_steps and (self.unet_mean_weight or self.unet_variance_weight),
        )
        if not any(weights) and (self.reg_pool, self.reg_batch) != ("layer", "sum"):
            raise InputError(
                f"reg_pool = {self.reg_pool!r} and reg_batch = {self.reg_batch!r} shape the attention regularizer, "
                "which no stage has; take them out, or give a stage a mean_weight or a variance_weight"
            )


@options
class Sampling:
    """How a trained artifact is used."""

    # For analyses stage by stage.
    after_stage: Annotated[
        Literal["embedding", "attention", "unet"], Field(description="takes the weights as they were after that stage")
    ] = "unet"


class AttnDreamBooth(EmbeddingAndUNet):
    """The embedding, then the cross-attention, then the whole U-Net, each kept near how the class noun is attended.

    A new optimizer for each stage. No prior preservation: the authors found that it hurts identity. No gradient is
    clipped: the code's call names the U-Net, and only in the stage that does not train it.
    """

    Config = Config
    Sampling = Sampling

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        initial = class_embedding(base, concept.class_noun, config.class_token_rule)
        self.embedding = ConceptEmbedding(initial, learned=config.embedding_steps > 0)
        names = parameter_names(base.unet)
        of_attention = [name for name in names if ".attn2." in name]
        learned = names if config.unet_steps else of_attention if config.attention_steps else []
        self.unet = TunedWeights(base.unet, learned)
        # The cross-attention as the second stage leaves it, for looking at the stages; the embedding never changes
        # after the first.
        both = config.attention_steps and config.unet_steps
        self.after_attention = KeptWeights(base.unet, of_attention if both else [])

    def stages(self) -> list[Stage]:
        c = self.config
        attention = [weight for name, weight in self.unet.items() if ".attn2." in name]

        def keep_attention(index: int) -> None:
            if index + 1 == c.attention_steps:
                self.after_attention.keep(self.unet)

        table: list[tuple[str, list[Any], Callable[[int], None]]] = [
            ("embedding", list(self.embedding.parameters()), lambda index: None),
            ("attention", attention, keep_attention),
            ("unet", list(self.unet.parameters()), lambda index: None),
        ]
        return [self._stage(*row) for row in table if getattr(c, f"{row[0]}_steps")]

    def _stage(self, name: str, trained: list[Any], after_step: Callable[[int], None]) -> Stage:
        settings = {
            key: getattr(self.config, f"{name}_{key}")
            for key in ("steps", "batch_size", "lr", "mean_weight", "variance_weight")
        }

        def penalty(step: Step) -> dict[str, Tensor]:
            return self.attention_penalty(step, settings["mean_weight"], settings["variance_weight"])

        return Stage(
            name,
            settings["steps"],
            settings["batch_size"],
            [{"params": trained, "lr": settings["lr"]}],
            penalty,
            after_step,
            max_gradient_norm=math.inf,
        )

    def attention_penalty(self, step: Step, mean_weight: float, variance_weight: float) -> dict[str, Tensor]:
        """Eq. 2: the placeholder is to be attended as much, and as unevenly, as the class noun behind it.

        Mean and variance of each token's map over heads and locations, and the squared difference of the two tokens'.
        The paper pools the values of all 16 maps; its code takes each layer by itself, averages the squares over the
        layers and sums them over the batch. By default the code's; neither map is detached.
        """
        if not (mean_weight or variance_weight):
            return {}
        columns = torch.stack([_shares(step.context.placeholder), _shares(self._noun(step.context))], dim=-1)
        mean, variance = step.maps.statistics(LAYERS, columns, self.config.reg_pool)
        penalties = {}
        if mean_weight:
            penalties["attention_mean"] = mean_weight * self._distance(mean)
        if variance_weight:
            penalties["attention_variance"] = variance_weight * self._distance(variance)
        return penalties

    def _distance(self, statistic: Tensor) -> Tensor:
        """statistic: (layers, B, 2), or (1, B, 2) if pooled, of placeholder and class noun."""
        squares = (statistic[..., 0] - statistic[..., 1]).pow(2).mean(dim=0)  # (B,)
        return squares.sum() if self.config.reg_batch == "sum" else squares.mean()

    def _noun(self, context: TextContext) -> Tensor:
        """(B, L) bool: the tokens of the class noun that the regularizer looks at."""
        if self.config.class_token_rule == "first":
            return context.class_noun & (context.class_noun.cumsum(dim=1) == 1)
        return context.class_noun

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        stage = "unet" if self.training else self.sampling.after_stage
        if stage == "embedding":
            return nullcontext()
        if stage == "attention" and self.config.unet_steps:
            return self.after_attention.placed_in(base.unet)
        return super().attach(base)

    @classmethod
    def lacks_under(cls, config: Config) -> Mapping[str, str]:
        if config.unet_steps:
            return cls.lacks
        return CROSS_ATTENTION if config.attention_steps else Method.lacks

    @classmethod
    def check(cls, config: Config, sampling: Sampling) -> None:
        stage = sampling.after_stage
        if stage != "unet" and not getattr(config, f"{stage}_steps"):  # "unet" is the end, whatever the last stage is
            raise InputError(
                f"after_stage: {stage} takes the weights as they were after a stage that was left out "
                f"({stage}_steps = 0); choose another stage"
            )

    @classmethod
    def losses_read_attention(cls, config: Config) -> bool:
        return any(
            getattr(config, f"{stage}_steps")
            and (getattr(config, f"{stage}_mean_weight") or getattr(config, f"{stage}_variance_weight"))
            for stage in ("embedding", "attention", "unet")
        )


def _shares(tokens: Tensor) -> Tensor:
    """(B, L) bool to weights with which the tokens' maps add up to their mean."""
    return tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)
