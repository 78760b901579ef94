"""Textual Inversion.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
ICLR 2023, arXiv:2208.01618.
"""

from __future__ import annotations

import math

from torch import Generator

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.interface import Batch, Stage
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.one_embedding import EmbeddingAlone
from personalize_core.methods.shared.training_batches import from_templates
from personalize_core.methods.textual_inversion.recipe import Config


class TextualInversion(EmbeddingAlone):
    """One input embedding, read in the placeholder's place (sec. 4.1); nothing else moves."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": [self.embedding.vector], "lr": c.lr}]
        unclipped = math.inf  # as diffusers' script and the authors' config leave them
        return [
            Stage("embedding", c.steps, c.batch_size, groups, max_gradient_norm=unclipped, min_timestep=c.min_timestep)
        ]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)
