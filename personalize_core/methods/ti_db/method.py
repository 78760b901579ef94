"""TI+DB: Textual Inversion and DreamBooth at once, the joint baseline of AttnDreamBooth.

Pang et al., "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", NeurIPS 2024,
arXiv:2406.05000. Its appendix gives the optimizer's settings and no code; prompt and initial embedding are not
stated there, so they are AttnDreamBooth's own.
"""

from __future__ import annotations

from pathlib import Path

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods.interface import Stage
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.embedding_and_unet import EmbeddingAndUNet
from personalize_core.methods.shared.interchange import fill, read_embedding, read_network
from personalize_core.methods.shared.tuned_weights import TunedWeights, parameter_names
from personalize_core.methods.ti_db.recipe import Config


class TIDB(EmbeddingAndUNet):
    """The placeholder's embedding and every weight of the U-Net, trained together; no prior preservation."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        self.unet = TunedWeights(base.unet, parameter_names(base.unet), base.unrounded)

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [
            {"params": list(self.embedding.parameters()), "lr": c.lr_embedding or c.lr},
            {"params": list(self.unet.parameters()), "lr": c.lr},
        ]
        return [Stage("joint", c.steps, c.batch_size, groups)]

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> TIDB:
        """A folder with a U-Net's in it, and an embedding's file."""
        method = cls(config, base, concept)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_encoders.widths)}, path)
        fill(method.unet.items(), read_network(base.unet, path / "unet"), path / "unet")
        return method
