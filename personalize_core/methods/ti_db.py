"""TI+DB: Textual Inversion and DreamBooth at once, the joint baseline of AttnDreamBooth.

Pang et al., "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", NeurIPS 2024,
arXiv:2406.05000. Its appendix gives the optimizer's settings and no code; prompt and initial embedding are not
stated there, so they are AttnDreamBooth's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from diffusers import UNet2DConditionModel
from pydantic import Field

from personalize_core.base import BaseModel
from personalize_core.concept import Concept
from personalize_core.data import Preprocessing
from personalize_core.interchange import elsewhere, fill, read_embedding, read_network, save_embedding
from personalize_core.method import Method, Stage, options
from personalize_core.parts import (
    WHOLE_UNET,
    ConceptEmbedding,
    TokenRule,
    TunedWeights,
    class_embedding,
    parameter_names,
)
from personalize_core.text import Conditioning


@options
class Config:
    """Defaults are the paper's (appendix A), for Stable Diffusion 2.1-base: AttnDreamBooth's steps and batch."""

    steps: Annotated[int, Field(gt=0)] = 660  # 60 + 100 + 500
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0)] = 2e-6
    # One rate for both is the point of this baseline: the embedding hardly moves (a cosine of 0.9997 to its start).
    lr_embedding: Annotated[float, Field(gt=0)] | None = None  # a rate of the embedding's own; `lr` if None
    class_token_rule: TokenRule = "last"  # the embedding starts from this token of the class noun
    rotate: bool = True  # AttnDreamBooth's code turns and mirrors photographs; its paper does not say so


class TIDB(Method):
    """The placeholder's embedding and every weight of the U-Net, trained together; no prior preservation."""

    Config = Config
    lacks = WHOLE_UNET
    preprocessing = Preprocessing("rotate", "bilinear", flip=True)

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        self.unet = TunedWeights(base.unet, parameter_names(base.unet))

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [
            {"params": list(self.embedding.parameters()), "lr": c.lr_embedding or c.lr},
            {"params": list(self.unet.parameters()), "lr": c.lr},
        ]
        return [Stage("joint", c.steps, c.batch_size, groups)]

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept, self.embedding.vector)
        return lambda t: context

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return self.unet.placed_in(base.unet)

    def export(self, base: BaseModel, folder: Path) -> str:
        tuned: Any = UNet2DConditionModel.from_config(base.unet.config)
        tuned.load_state_dict(self.unet.as_state_dict())
        tuned.save_pretrained(folder / "unet")
        how = save_embedding(self.embedding.vector, self.concept, folder)
        return (
            'Load the pipeline with unet=UNet2DConditionModel.from_pretrained("unet"), then '
            f"{how}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"
        )

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> TIDB:
        """A folder with a U-Net's in it, and an embedding's file."""
        method = cls(config, base, concept)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_width)}, path)
        fill(method.unet.items(), read_network(UNet2DConditionModel, path / "unet"), path / "unet")
        return method

    @classmethod
    def text_embeddings(cls, config: Config) -> int:
        return 1

    @classmethod
    def preprocessing_for(cls, config: Config) -> Preprocessing:
        return cls.preprocessing if config.rotate else Preprocessing("crop", "bilinear", flip=False)
