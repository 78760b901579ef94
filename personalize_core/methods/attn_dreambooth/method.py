"""AttnDreamBooth.

Pang et al., "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", NeurIPS 2024,
arXiv:2406.05000. Equation numbers below are that paper's. Where paper and released code differ we follow the code,
since the recipe was tuned with it; the paper's readings are `reg_pool: all` and `rotate: false`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from personalize_core.base_model.attention import by_transformer
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.attn_dreambooth.recipe import Config
from personalize_core.methods.interface import Attach, Batch, Stage, Step
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.embedding_and_unet import EmbeddingAndUNet
from personalize_core.methods.shared.training_batches import with_prior
from personalize_core.methods.shared.tuned_weights import KeptWeights, TunedWeights, parameter_names

TEMPLATE = "a photo of a {}"


class AttnDreamBooth(EmbeddingAndUNet):
    """The embedding, then the cross-attention, then the whole U-Net, each kept near how the class noun is attended.

    A new optimizer for each stage. Prior preservation is off by default: the authors found that it hurts identity. No
    gradient is clipped: the code's call names the U-Net, and only in the stage that does not train it.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        initial = class_embedding(base, concept.class_noun, config.class_token_rule)
        self.embedding = ConceptEmbedding(initial, learned=config.embedding_steps > 0)
        names = parameter_names(base.unet)
        of_attention = [name for name in names if ".attn2." in name]
        learned = names if config.unet_steps else of_attention if config.attention_steps else []
        self.unet = TunedWeights(base.unet, learned, base.unrounded)
        # The cross-attention as the second stage leaves it, for looking at the stages; the embedding never changes
        # after the first.
        both = config.attention_steps and config.unet_steps
        self.after_attention = KeptWeights(base.unet, of_attention if both else [], base.unrounded)

    def stages(self) -> list[Stage]:
        c = self.config
        attention = [weight for name, weight in self.unet.items() if ".attn2." in name]

        def keep_attention() -> None:
            self.after_attention.keep(self.unet)

        def keep_nothing() -> None:
            pass

        table: list[tuple[str, list[Any], Callable[[], None], Attach]] = [
            ("embedding", list(self.embedding.parameters()), keep_nothing, lambda base: nullcontext()),
            ("attention", attention, keep_attention, lambda base: self.unet.placed_in(base.unet, holding=".attn2.")),
            ("unet", list(self.unet.parameters()), keep_nothing, self.attach),
        ]
        return [self._stage(*row) for row in table if getattr(c, f"{row[0]}_steps")]

    def _stage(self, name: str, trained: list[Any], at_end: Callable[[], None], attach: Attach) -> Stage:
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
            at_end=at_end,
            max_gradient_norm=math.inf,
            attach=attach,
        )

    def attention_penalty(self, step: Step, mean_weight: float, variance_weight: float) -> dict[str, Tensor]:
        """Eq. 2: the placeholder is to be attended as much, and as unevenly, as the class noun behind it.

        Mean and variance of each token's map over heads and locations, and the squared difference of the two tokens'.
        The paper pools the values of all layers' maps; its code takes each layer by itself, averages the squares over
        the layers and sums them over the batch. By default the code's; neither map is detached.
        """
        if not (mean_weight or variance_weight) or (self.config.constraint == "values" and not mean_weight):
            return {}
        placeholder, noun = step.context.placeholder, self._noun(step.context)
        noun = noun & placeholder.any(dim=1, keepdim=True)  # of images of the class there is nothing to compare
        layers = tuple(step.maps)
        if self.config.constraint == "values":
            return self._constrained_values(step, layers, _shares(placeholder) - _shares(noun), mean_weight)
        columns = torch.stack([_shares(placeholder), _shares(noun)], dim=-1)
        mean, variance = step.maps.statistics(layers, columns, self.config.reg_pool)
        penalties = {}
        if mean_weight:
            penalties["attention_mean"] = mean_weight * self._distance(mean, layers, step.share)
        if variance_weight:
            penalties["attention_variance"] = variance_weight * self._distance(variance, layers, step.share)
        return penalties

    def _distance(self, statistic: Tensor, layers: tuple[str, ...], share: float) -> Tensor:
        """statistic: (layers, B, 2), or (1, B, 2) if pooled, of placeholder and class noun. share: see Step."""
        squares = (statistic[..., 0] - statistic[..., 1]).pow(2)
        return self._over_rows(self._over_layers(squares, layers), share)

    def _over_layers(self, squares: Tensor, layers: tuple[str, ...]) -> Tensor:
        """(layers, B), or (1, B) if pooled -> (B,). Every transformer counts as much, however many layers it has."""
        return (squares if len(squares) == 1 else by_transformer(squares, layers)).mean(dim=0)

    def _constrained_values(
        self, step: Step, layers: tuple[str, ...], difference: Tensor, weight: float
    ) -> dict[str, Tensor]:
        """The mean of (M_V - M_class)^2 over all values, which is the mean squared and n - 1 n-ths of the variance.

        difference: (B, L), of which the maps' weighted sum is M_V - M_class.
        """
        pool = self.config.reg_pool
        mean, variance = (found[..., 0] for found in step.maps.statistics(layers, difference[..., None], pool))
        n = step.maps.sizes(layers, mean.device)[..., 0]  # (layers, 1)
        n = n.sum(dim=0, keepdim=True) if pool == "all" else n
        squares = self._over_layers(mean.pow(2) + variance * (n - 1) / n, layers)
        return {"attention_values": weight * self._over_rows(squares, step.share)}

    def _over_rows(self, squares: Tensor, share: float) -> Tensor:
        """squares: (B,), 0 of images of the class."""
        if self.config.reg_batch == "sum":
            return squares.sum()
        return share * squares.mean() * (2 if self.config.prior_preservation else 1)  # half of the rows are of these

    def _noun(self, context: TextContext) -> Tensor:
        """(B, L) bool: the tokens of the class noun that the regularizer looks at."""
        if self.config.class_token_rule == "first":
            return context.class_noun & (context.class_noun.cumsum(dim=1) == 1)
        return context.class_noun

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        stage = "unet" if self.training else self.sampling.after_stage
        if stage == "embedding":
            return nullcontext()
        if stage == "attention" and self.config.unet_steps:
            return self.after_attention.placed_in(base.unet)
        return super().attach(base)


def _shares(tokens: Tensor) -> Tensor:
    """(B, L) bool to weights with which the tokens' maps add up to their mean."""
    return tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)
