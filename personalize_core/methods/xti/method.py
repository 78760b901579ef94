"""Extended Textual Inversion (XTI): an embedding for each cross-attention layer, the space P+.

Voynov et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522. The authors released
no code; the recipe is that of a public port, mkshing/prompt-plus-pytorch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Generator, Tensor, nn

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.shared.concept_embedding import class_embedding, drift
from personalize_core.methods.shared.training_batches import from_templates
from personalize_core.methods.xti.recipe import Config


class XTI(Method):
    """An input embedding for each transformer, whose cross-attention layers read the prompt as encoded with it.

    In Stable Diffusion 1 and 2 those are sixteen, one for each layer. In all else it is Textual Inversion.
    """

    Config = Config
    initial: Tensor  # (D,)

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        start = class_embedding(base, concept.class_noun, config.class_token_rule).float()
        self.embeddings = nn.Parameter(
            start.repeat(len(base.transformers), 1)
        )  # (transformers, D), in the order they run
        self.register_buffer("initial", start, persistent=False)
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": [self.embeddings], "lr": c.lr}]
        unclipped = math.inf  # as the port leaves them
        return [
            Stage("embeddings", c.steps, c.batch_size, groups, max_gradient_norm=unclipped, min_timestep=c.min_timestep)
        ]

    def metrics(self) -> dict[str, Tensor]:
        return drift(self.embeddings, self.initial)

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        # A U-Net that is told of the whole text is told of one: with the mean of the embeddings, which is ours.
        of_all = self.embeddings.mean(dim=0) if len(base.text_encoders) > 1 else None
        context = base.encode(prompts, self.concept, of_all)
        if any(self.concept.placeholder in prompt for prompt in prompts):  # else every layer reads the same
            distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
            read = base.prompt_reader.encode_variants([*distinct], self.concept, self.embeddings[:, None])
            texts = base.prompt_reader.final_norm(read.hidden)
            if len(distinct) < len(prompts):
                texts = texts[:, [distinct[prompt] for prompt in prompts]]
            context = dataclasses.replace(context, layers=(texts, texts), of_layer=base.transformer_of_layer)
        return lambda t: context
