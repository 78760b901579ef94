"""Directional Textual Inversion (DTI).

Kim et al., "Directional Textual Inversion for Personalized Text-to-Image Generation", ICLR 2026, arXiv:2512.13672.
An embedding that Textual Inversion trains grows far longer than any of the vocabulary, and then drowns out the words
around it; what it means lies in its direction. So e = m v is trained with its norm m fixed and v on the unit sphere, by
Riemannian gradient descent, under a von Mises-Fisher prior whose mean is the direction of the initial word.

The paper's abstract and project page say this much, and are what we had of its text. That a step's gradient has length
one, what m is, and all numbers are from the authors' code (kunheek/dti, MIT, commit 6e66104).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.dti.recipe import Config
from personalize_core.methods.interface import Batch, Stage, Step
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.one_embedding import EmbeddingAlone
from personalize_core.methods.shared.training_batches import from_templates


class SphereDescent(torch.optim.Optimizer):
    """Riemannian gradient descent on a sphere around the origin, with gradients of length one.

    Of a vector e = m v the gradient by v is made tangent, g - <g, v> v, and scaled to length one; v goes `lr` against
    it, and back to the sphere: v <- (v - lr g) / |v - lr g|. A vector that starts off the sphere is put on it first.

    Args:
        groups: of vectors (..., D), as torch.optim takes them.
        radius: m, (); or of each part of the vectors, which has a sphere of its own.
        widths: of the parts; by default there is one.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], radius: Tensor | Sequence[Tensor], widths: Sequence[int] | None = None
    ) -> None:
        super().__init__(groups, {})
        self.radii = [radius] if isinstance(radius, Tensor) else radius
        self.widths = widths

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for whole in group["params"]:
                widths = list(self.widths or whole.shape[-1:])
                parts = zip(whole.split(widths, -1), whole.grad.split(widths, -1), self.radii, strict=True)
                for e, gradient, radius in parts:
                    v = F.normalize(e, dim=-1)
                    tangent = gradient - (gradient * v).sum(dim=-1, keepdim=True) * v
                    e.copy_(radius * F.normalize(v - group["lr"] * F.normalize(tangent, dim=-1), dim=-1))


class DirectionalTextualInversion(EmbeddingAlone):
    """The direction of one input embedding, read in the placeholder's place; nothing else moves."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.widths = base.text_encoders.widths
        start = class_embedding(base, concept.class_noun, config.class_token_rule).split(self.widths)
        m = [part.norm() for part in start] if config.norm == "initial" else mean_norms(base)
        spheres = zip(m, start, strict=True)
        self.embedding = ConceptEmbedding(torch.cat([radius * F.normalize(part, dim=0) for radius, part in spheres]))
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    def stages(self) -> list[Stage]:
        c, radii = self.config, [part.norm() for part in self.embedding.initial.split(self.widths)]
        return [
            Stage(
                "direction",
                c.steps,
                c.batch_size,
                [{"params": [self.embedding.vector], "lr": c.lr}],
                later_penalty=self._prior,
                max_gradient_norm=math.inf,  # a step's length does not depend on the gradient's
                min_timestep=c.min_timestep,
                optimizer=lambda groups: SphereDescent(groups, radii, self.widths),
            )
        ]

    def _prior(self, step: Step) -> dict[str, Tensor]:
        """-kappa <mu, v>: the negative logarithm of a von Mises-Fisher density, but for a constant.

        Its gradient by v is -kappa mu, wherever v is. Of a pair, the sum of both, as of independent directions.
        """
        if not self.config.kappa:
            return {}
        parts = zip(self.embedding.initial.split(self.widths), self.embedding.vector.split(self.widths), strict=True)
        cosines = [F.normalize(initial, dim=0) @ vector / initial.norm() for initial, vector in parts]
        agreement = cosines[0] if len(cosines) == 1 else torch.stack(cosines).sum()
        return {"prior": -self.config.kappa * step.share * agreement}

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)


def mean_norms(base: BaseModel) -> list[Tensor]:
    """() for each text encoder: of its vocabulary's input embeddings; rows of zeros are no words."""
    norms = [table.weight.detach().float().norm(dim=-1) for table in base.text_encoders.tables]
    return [each.sum() / each.count_nonzero() for each in norms]
