"""Extended Textual Inversion (XTI): an embedding for each cross-attention layer, the space P+.

Voynov et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522. The authors released
no code. The recipe is recalled, not read (methods.md section 11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor, nn

from personalize_core.base_model.model import LAYERS, BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents, Preprocessing
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.interface import Batch, Method, Stage, options
from personalize_core.methods.shared.parts import MinTimestep, TokenRule, class_embedding, drift, from_templates


@options
class Config:
    """Defaults are the paper's for Stable Diffusion 1.4 as they are recalled (methods.md section 11)."""

    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0)] = 5e-3
    min_timestep: MinTimestep = 0
    templates: str = "ti_object_27"  # training prompts; the concept alone stands in their slot
    class_token_rule: TokenRule = "last"  # the embeddings start from this token of the class noun


class XTI(Method):
    """Sixteen input embeddings; each cross-attention layer reads the prompt as encoded with its own.

    In all else it is Textual Inversion.
    """

    Config = Config
    initial: Tensor  # (D,)
    preprocessing = Preprocessing("squash", "bicubic", flip=True)

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        start = class_embedding(base, concept.class_noun, config.class_token_rule).float()
        self.embeddings = nn.Parameter(start.repeat(len(LAYERS), 1))  # (16, D), in the order the layers run
        self.register_buffer("initial", start, persistent=False)
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    @classmethod
    def text_embeddings(cls, config: Config) -> int:
        return len(LAYERS)

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": [self.embeddings], "lr": c.lr}]
        return [Stage("embeddings", c.steps, c.batch_size, groups, min_timestep=c.min_timestep)]

    def metrics(self) -> dict[str, float]:
        return drift(self.embeddings, self.initial)

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept)
        if context.placeholder.any():  # else every layer reads the same
            rows = self.embeddings.repeat_interleave(len(prompts), dim=0)[:, None]  # (16 B, 1, D), layer after layer
            texts = base.encode([*prompts] * len(LAYERS), self.concept, rows).hidden.unflatten(0, (len(LAYERS), -1))
            context = dataclasses.replace(context, layers=(texts, texts))
        return lambda t: context
