"""Methods that learn one embedding in the placeholder's place, alone or beside something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import Concept
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.interchange import elsewhere, fill, read_embedding, save_embedding


class OneEmbedding(Method):
    """A method that learns the placeholder's embedding, whatever it learns besides; a subclass creates it."""

    embedding: ConceptEmbedding

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept, self.embedding.vector)
        return lambda t: context


class EmbeddingAlone(OneEmbedding):
    """A method that learns the placeholder's embedding and nothing else, however it is trained."""

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def export(self, base: BaseModel, folder: Path) -> str:
        how = save_embedding(self.embedding.vector, base, self.concept, folder)
        return f"{how}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"

    @classmethod
    def imported(cls, config: Any, base: BaseModel, concept: Concept, path: Path) -> Self:
        method = cls(config, base, concept)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_encoders.widths)}, path)
        return method
