"""Textual Inversion.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
ICLR 2023, arXiv:2208.01618.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Generator

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.interchange import elsewhere, fill, read_embedding, save_embedding
from personalize_core.methods.shared.training_batches import from_templates
from personalize_core.methods.textual_inversion.recipe import Config


class TextualInversion(Method):
    """One input embedding, read in the placeholder's place (sec. 4.1); nothing else moves."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": [self.embedding.vector], "lr": c.lr}]
        unclipped = math.inf  # as diffusers' script and the authors' config leave them
        return [
            Stage("embedding", c.steps, c.batch_size, groups, max_gradient_norm=unclipped, min_timestep=c.min_timestep)
        ]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept, self.embedding.vector)
        return lambda t: context

    def export(self, base: BaseModel, folder: Path) -> str:
        how = save_embedding(self.embedding.vector, self.concept, folder)
        return f"{how}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> TextualInversion:
        method = cls(config, base, concept)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_width)}, path)
        return method
