"""Methods that learn the placeholder's embedding and weights of the U-Net."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.shared.interchange import elsewhere, save_embedding
from personalize_core.methods.shared.one_embedding import OneEmbedding
from personalize_core.methods.shared.tuned_weights import TunedWeights


class EmbeddingAndUNet(OneEmbedding):
    """A method that learns the placeholder's embedding and weights of the U-Net, and all that follows from that.

    A subclass creates both; its recipe inherits EmbeddingAndUNetRecipe.
    """

    unet: TunedWeights

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return self.unet.placed_in(base.unet)

    def export(self, base: BaseModel, folder: Path) -> str:
        """The embedding, and the U-Net if any of its weights were tuned."""
        steps = []
        if self.unet.weights:
            whole: Any = UNet2DConditionModel.from_config(base.unet.config)
            whole.load_state_dict(base.unet.state_dict() | dict(base.unrounded) | self.unet.as_state_dict())
            whole.save_pretrained(folder / "unet")
            steps.append('Load the pipeline with unet=UNet2DConditionModel.from_pretrained("unet").')
        steps.append(save_embedding(self.embedding.vector, base, self.concept, folder))
        return f"{' '.join(steps)}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"
