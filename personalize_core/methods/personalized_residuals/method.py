"""Personalized Residuals, and localized attention-guided (LAG) sampling.

Ham et al., "Personalized Residuals for Concept-Driven Text-to-Image Generation", CVPR 2024, arXiv:2405.12978.
Section and equation numbers below are that paper's. No code was released; what the paper leaves open is decided
in docs/methods.md and said here where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import listed
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.personalized_residuals.recipe import Config
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.interchange import (
    LORA,
    elsewhere,
    fill,
    read_embedding,
    save_embedding,
)
from personalize_core.methods.shared.lag import apart, attached, localized, region
from personalize_core.methods.shared.layer_modules import LayerModules, stored
from personalize_core.methods.shared.lora_files import check_held, read_lora, with_rank
from personalize_core.methods.shared.merged_weights import merged

Target = Literal["proj_out", "proj_in", "to_k", "to_v"]
AROUND = ("proj_out", "proj_in")  # of each transformer; the others are of each cross-attention layer


class Residual(nn.Module):
    """The low-rank change A B to a projection of n channels to m (sec. 3.2).

    Deviates from the paper, which starts both factors at random and so perturbs the model before the first step:
    B starts at zero here, and training starts from the base model. `initial: gaussian` is the literal reading.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, initial: str) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(outputs, rank) * 0.02)
        self.B = nn.Parameter(torch.randn(rank, inputs) * (0.02 if initial == "gaussian" else 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, n, h, w) before a convolution, (B, positions, n) before a linear layer."""
        if x.ndim == 4:
            return F.conv2d(F.conv2d(x, self.B[..., None, None]), self.A[..., None, None])
        return F.linear(F.linear(x, self.B), self.A)

    def merged(self, W: Tensor) -> Tensor:
        return W + self.A @ self.B


class PersonalizedResiduals(Method):
    """A residual on a projection of every transformer block, by default on its output projection (eq. 1)."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        shapes = {path: layer.weight.shape[:2] for path, layer in self._projections(base).items()}
        self.residuals = LayerModules(
            {
                path: Residual(inputs, outputs, max(1, round(config.rank_fraction * outputs)), config.initial)
                for path, (outputs, inputs) in shapes.items()
            }
        )
        self.embedding = ConceptEmbedding(base.rare_embedding()) if config.train_embedding else None

    @property
    def phrase(self) -> str:
        return super().phrase if self.config.macro_class else self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("residuals", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        batch = super().batch(images, size, generator)
        if not self.config.class_images:
            return batch
        prior, said = images.prior_rows(size, generator), f"a photo of a {self.concept.class_noun}"
        return batch.followed_by(Batch.of(prior, [said] * size, self.config.prior_weight))

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept, self.embedding.vector if self.embedding else None)
        return lambda t: context

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        if not apart(self):
            return merged(base, {path: residual.merged for path, residual in self.residuals.by_path()})
        if self.config.targets == ("proj_out",):
            return hooked(*(handle for path in base.transformers for handle in self._hooks(base, path)))
        return attached(base, self, lambda transformer: hooked(*self._hooks(base, transformer)))

    def _hooks(self, base: BaseModel, transformer: str) -> list[RemovableHandle]:
        projections = self._projections(base, [transformer])
        return self.residuals.hooks(projections, lambda residual: self._adding(residual, transformer, base))

    def _projections(self, base: BaseModel, transformers: Iterable[str] | None = None) -> dict[str, Any]:
        """Path in the U-Net -> nn.Linear or 1x1 nn.Conv2d, in some transformers or all."""
        found = {}
        for path in base.transformers if transformers is None else transformers:
            for target in self.config.targets:
                if target in AROUND:
                    found[f"{path}.{target}"] = base.transformers[path].get_submodule(target)
                    continue
                for block in base.blocks_of([path]):
                    found[f"{block.path}.attn2.{target}"] = block.module.attn2.get_submodule(target)
        return found

    def _adding(self, residual: nn.Module, transformer: str, base: BaseModel) -> Callable:
        at_the_end = self.config.targets == ("proj_out",)  # by then the transformer has looked at the words

        def hook(module: nn.Module, args: tuple[Tensor], original: Tensor) -> Tensor:
            changed = original + residual(args[0])
            if self.training or not self.sampling.lag or not at_the_end:
                return changed
            inside = region(base.call, transformer, self.place, self.sampling.lag_unconditional)
            return localized(inside, original, changed)

        return hook

    def export(self, base: BaseModel, folder: Path) -> str:
        tensors = {}
        for path, projection in self._projections(base).items():
            residual = self.residuals.of(path)
            for name, factor in (("lora_A", residual.B), ("lora_B", residual.A)):  # PEFT computes B(A x)
                axes = factor.shape + (1, 1) * isinstance(projection, nn.Conv2d)
                tensors[f"unet.{path}.{name}.weight"] = factor.reshape(axes)
        save_tensors(folder / LORA, tensors)
        how, word = 'pipe.load_lora_weights("pytorch_lora_weights.safetensors")', base.tokenizer.rare_word
        if self.embedding:
            word = self.concept.placeholder
            how += f", {save_embedding(self.embedding.vector, base, self.concept, folder)}"
        said = f"{word} {self.concept.class_noun}" if self.config.macro_class else word
        other = f" {elsewhere(self.concept)}" if self.embedding else ""
        return f"{how}, and write {said!r} in prompts. (Without LAG.){other}"

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> PersonalizedResiduals:
        """A LoRA of just the projections that the configuration names, of at most its rank."""
        method, tensors = cls(config, base, concept), {}
        found = read_lora(path, base)
        check_held(found.paths(), method.residuals.paths(), path, listed(config.targets))
        for layer, factors in found.unet.items():
            down, up = with_rank(*factors, method.residuals.of(layer).A.shape[1], path)  # PEFT's A is this B
            tensors |= {f"residuals.{stored(layer)}.A": up, f"residuals.{stored(layer)}.B": down}
        if method.embedding:
            tensors["embedding.vector"] = read_embedding(path, base.text_encoders.widths)
        fill(method.named_parameters(), tensors, path)
        return method
