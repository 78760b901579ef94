"""ClassDiffusion.

Huang et al., "ClassDiffusion: More Aligned Personalization Tuning with Explicit Class Guidance", ICLR 2025,
arXiv:2405.17532. Tuning moves what the text encoder makes of "V* dog" away from what it makes of "dog", and with it
goes what the model can do with a dog. So Custom Diffusion's training gets a loss on that distance: one minus the cosine
of the features of the two phrases' end tokens.

The abstract, the paper's figure of the method with its caption, and the authors' launcher, from which the numbers are,
were at hand; the training code has no licence and was not read. Custom Diffusion's zoom and its class images are left
out: the launcher turns class images off, and the zoom needs words that are no part of this paper.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.class_diffusion.recipe import Config
from personalize_core.methods.interface import Batch, Stage, Step
from personalize_core.methods.shared.attention_processors import read_processors, save_processors
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.interchange import elsewhere, fill, read_embedding, save_embedding
from personalize_core.methods.shared.lag import attached
from personalize_core.methods.shared.one_embedding import OneEmbedding
from personalize_core.methods.shared.tuned_weights import TunedWeights

TEMPLATE = "a photo of a {}"
START = "ktn"  # the entry of the vocabulary that Custom Diffusion's embedding starts from


class ClassDiffusion(OneEmbedding):
    """Keys and values of every cross-attention layer, and the embedding of one new word."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        start = base.entry_embedding(START)
        self.embedding = ConceptEmbedding(base.rare_embedding() if start is None else start)
        names = [
            f"{block.path}.attn2.{projection}.weight" for block in base.blocks_of() for projection in ("to_k", "to_v")
        ]
        self.weights = TunedWeights(base.unet, names, base.unrounded)

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": list(self.parameters()), "lr": c.lr}]
        return [Stage("weights", c.steps, c.batch_size, groups, later_penalty=self._semantic_preservation)]

    def _semantic_preservation(self, step: Step) -> dict[str, Tensor]:
        """lambda (1 - cos(e(V* class), e(class))), e being the text encoder's features of the end token."""
        c = self.config
        if not c.spl_weight:
            return {}
        concept = _end_features(self.condition(step.base, [self.phrase])(step.t))
        with torch.no_grad():
            named = _end_features(step.base.encode([self.concept.class_noun], self.concept))
        widths = step.base.text_encoders.widths
        pairs = zip(concept.split(widths, dim=-1), named.split(widths, dim=-1), strict=True)
        cosines = [F.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]  # one for each text encoder
        distance = 1 - (cosines[0] if len(cosines) == 1 else torch.stack(cosines).mean())
        return {"semantic_preservation": c.spl_weight * step.share * distance}

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return Batch.of(images.instance_rows(size, generator), [self.say(TEMPLATE)] * size)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return attached(base, self, lambda layer: self.weights.placed_in(base.unet, f"{layer}."))

    def export(self, base: BaseModel, folder: Path) -> str:
        how = save_processors(self.weights.items(), base, folder)
        word = save_embedding(self.embedding.vector, base, self.concept, folder)
        return f"{how}; {word}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> ClassDiffusion:
        """A folder with the attention processors' weights, keys and values alone, and an embedding's file."""
        method = cls(config, base, concept)
        fill(method.weights.items(), read_processors(path), path)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_encoders.widths)}, path)
        return method


def _end_features(context: TextContext) -> Tensor:
    """(B, D): what the cross-attention layers read of each row's first end token.

    Of Stable Diffusion 1 and 2 it lies behind the final layer norm, as CLIP takes a text's features.
    """
    return (context.hidden * context.end[..., None]).sum(dim=1)  # an index by a mask would wait for a card
