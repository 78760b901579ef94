"""DreamBooth by low-rank adaptation (LoRA) of the attention projections.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, under the recipe of
diffusers' DreamBooth LoRA example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from personalize_core.base_model.model import BaseModel, hooked
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.lora_dreambooth.recipe import Config
from personalize_core.methods.shared.interchange import fill
from personalize_core.methods.shared.lag import attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections, stored
from personalize_core.methods.shared.lora_files import LORA, check_held, read_lora, with_rank
from personalize_core.methods.shared.training_batches import with_prior

TEMPLATE = "a photo of {}"


class LowRank(nn.Module):
    """The change B A x to a linear layer W x (sec. 4.1). A starts Gaussian, B at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, inputs) / rank)  # diffusers' deviation; the paper gives none
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)


class LoRADreamBooth(Method):
    """A low-rank change to every attention projection of the U-Net; the placeholder reads a rare word's embedding."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.changes = LayerModules(
            {
                path: LowRank(layer.in_features, layer.out_features, config.rank)
                for path, layer in attention_projections(base).items()
            }
        )

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("changes", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return attached(base, self, lambda transformer: self._inside(base, transformer))

    def _inside(self, base: BaseModel, transformer: str) -> AbstractContextManager[Any]:
        return hooked(*self.changes.hooks(attention_projections(base, [transformer]), _adding))

    def export(self, base: BaseModel, folder: Path) -> str:
        tensors = {}
        for path, change in self.changes.by_path():
            tensors[f"unet.{path}.lora_A.weight"] = change.A
            tensors[f"unet.{path}.lora_B.weight"] = change.B
        save_tensors(folder / LORA, tensors)
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        return f'pipe.load_lora_weights("pytorch_lora_weights.safetensors"), and write {said!r} in prompts.'

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> LoRADreamBooth:
        """Layers that the file leaves alone are left alone; all get the rank of the largest."""
        found = read_lora(path, base)
        held = attention_projections(base)
        check_held({**found.unet, **found.text_encoder}, held, path, "the attention projections of the U-Net")
        changes = found.unet
        config = dataclasses.replace(config, rank=max(len(A) for A, _ in changes.values()))
        method, tensors = cls(config, base, concept), {}
        for name, start in method.changes.named_parameters():
            tensors[name] = torch.zeros_like(start)
        for layer, factors in changes.items():
            A, B = with_rank(*factors, config.rank, path)
            tensors |= {f"{stored(layer)}.A": A, f"{stored(layer)}.B": B}
        fill(method.changes.named_parameters(), tensors, path)
        return method


def _adding(change: nn.Module) -> Callable:
    return lambda layer, args, original: original + change(args[0]).to(original.dtype)
