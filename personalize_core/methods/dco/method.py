"""Direct Consistency Optimization (DCO).

Lee et al., "Direct Consistency Optimization for Robust Customization of Text-to-Image Diffusion Models", NeurIPS 2024,
arXiv:2402.12004. The concept images are preferred to what the base model expects, and the more so the less the U-Net
leaves it: of each image, -log sigmoid of how much better than the base model it predicts the noise, times beta.

The abstract, the project page and the README of the authors' code were at hand; the code has no licence and was not
read. The README says that an embedding is learned beside a low-rank change, that its norm is put back after every step,
that prompts describe each image at length, and the numbers. Taken to be ours: the mean over latent elements in the
errors, the prompt, and that the factor of the noise level is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.dco.recipe import Config
from personalize_core.methods.interface import Batch, Stage, Step
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.interchange import LORA, elsewhere, fill, read_embedding, save_embedding
from personalize_core.methods.shared.lag import apart, attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections, stored
from personalize_core.methods.shared.lora_files import check_held, read_lora, with_rank
from personalize_core.methods.shared.low_rank import LowRank, adding
from personalize_core.methods.shared.merged_weights import merged
from personalize_core.methods.shared.one_embedding import OneEmbedding

TEMPLATE = "a photo of a {}"


class DirectConsistency(OneEmbedding):
    """A low-rank change to every attention projection, and the embedding in the placeholder's place."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.widths = base.text_encoders.widths
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        layers = attention_projections(base)
        shapes = {path: (layer.in_features, layer.out_features, config.rank) for path, layer in layers.items()}
        self.changes = LayerModules({path: LowRank(*shape) for path, shape in shapes.items()})
        self._acting = True  # whether the changes act, while they are attached

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [
            {"params": list(self.changes.parameters()), "lr": c.lr},
            {"params": [self.embedding.vector], "lr": c.embedding_lr},
        ]
        objective = self.preference if c.beta else None
        return [Stage("changes", c.steps, c.batch_size, groups, after_step=self._put_norm_back, objective=objective)]

    def preference(self, step: Step) -> Tensor:
        """(B,): of each row -log sigmoid(-beta (l - l_base)), l being its mean squared error; as shares of a mean.

        l_base is the base model's, which reads the class noun where the concept stands.
        """
        said = [prompt.replace(self.phrase, self.concept.class_noun) for prompt in step.batch.prompts]
        with torch.no_grad(), self._at_rest():
            context = dataclasses.replace(step.base.encode(said, self.concept), sizes=step.context.sizes)
            expected = step.base.denoise(step.x_t, step.t, context)
        better = _errors(step.prediction, step.target) - _errors(expected, step.target)
        return step.batch.weight.mean(dim=(1, 2, 3)) * F.softplus(self.config.beta * better)

    @torch.no_grad()
    def _put_norm_back(self, index: int) -> None:
        """Only its direction is learned; of a pair, the direction of each."""
        vectors, initial = self.embedding.vector.split(self.widths), self.embedding.initial.split(self.widths)
        for vector, start in zip(vectors, initial, strict=True):
            vector.mul_(start.norm() / vector.norm())

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return Batch.of(images.instance_rows(size, generator), [self.say(TEMPLATE)] * size)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        if apart(self):
            return attached(base, self, lambda transformer: self._inside(base, transformer))
        return merged(base, {path: change.merged for path, change in self.changes.by_path()})

    def _inside(self, base: BaseModel, transformer: str) -> AbstractContextManager[Any]:
        return hooked(*self.changes.hooks(attention_projections(base, [transformer]), self._adding))

    def _adding(self, change: LowRank) -> Callable:
        add = adding(change)

        def add_if_acting(layer: nn.Module, args: tuple[Tensor], original: Tensor) -> Tensor:
            return add(layer, args, original) if self._acting else original

        return add_if_acting

    def export(self, base: BaseModel, folder: Path) -> str:
        tensors = {}
        for path, change in self.changes.by_path():
            tensors[f"unet.{path}.lora_A.weight"] = change.A
            tensors[f"unet.{path}.lora_B.weight"] = change.B
        save_tensors(folder / LORA, tensors)
        word = save_embedding(self.embedding.vector, base, self.concept, folder)
        return (
            f'pipe.load_lora_weights("{LORA}"); {word}, and write {self.phrase!r} in prompts. (With plain guidance.) '
            f"{elsewhere(self.concept)}"
        )

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> DirectConsistency:
        """A LoRA of attention projections, whose largest rank all get, and an embedding's file, in one folder."""
        found = read_lora(path, base)
        check_held(found.paths(), attention_projections(base), path, "the U-Net's attention projections")
        rank = max(len(A) for A, _ in found.unet.values())
        method = cls(dataclasses.replace(config, rank=rank), base, concept)
        tensors = {name: torch.zeros_like(start) for name, start in method.changes.named_parameters()}
        for layer, factors in found.unet.items():
            A, B = with_rank(*factors, rank, path)
            tensors |= {f"{stored(layer)}.A": A, f"{stored(layer)}.B": B}
        fill(method.changes.named_parameters(), tensors, path)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_encoders.widths)}, path)
        return method

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Within it, the U-Net is the base model's, though the changes are attached."""
        self._acting = False
        try:
            yield
        finally:
            self._acting = True


def _errors(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,): of each row the mean squared error."""
    return (prediction - target).pow(2).mean(dim=(1, 2, 3))
