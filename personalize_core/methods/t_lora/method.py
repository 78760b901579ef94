"""T-LoRA: low-rank adaptation whose rank falls with the noise, from an orthogonal start.

Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", AAAI 2026,
arXiv:2507.05964. Section and equation numbers are those of its first version. With much noise a model learns where
things are in the training images, so fewer components act there (sec. 3.2); the start makes them independent, so that
leaving some out leaves out what they hold (sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.shared.lag import attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections
from personalize_core.methods.t_lora.recipe import Config


class MaskedLowRank(nn.Module):
    """The change B S M_t A - B_init S_init M_t A_init to a linear layer (eq. 6), which starts at zero.

    The orthogonal start takes A, B and S from the last singular vectors and values of a random matrix (sec. 3.4). Its
    entries have the standard deviation 1 / r of the authors' code; the paper writes N(0, 1 / r). Otherwise A is
    Gaussian, B is zero and S one, as in LoRA.
    """

    A: Tensor  # (r, inputs)
    B: Tensor  # (outputs, r)
    S: Tensor  # (r,)
    A_init: Tensor
    B_init: Tensor
    S_init: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, orthogonal: bool) -> None:
        super().__init__()
        r = min(rank, inputs, outputs)
        if orthogonal:
            U, S, Vh = torch.linalg.svd(torch.randn(outputs, inputs) / r, full_matrices=False)
            A, B, S = Vh[-r:], U[:, -r:], S[-r:]
        else:
            A, B, S = torch.randn(r, inputs) / r, torch.zeros(outputs, r), torch.ones(r)
        for name, start in (("A", A), ("B", B), ("S", S)):
            setattr(self, name, nn.Parameter(start.clone()))
            self.register_buffer(f"{name}_init", start.clone())

    @property
    def rank(self) -> int:
        return len(self.S)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """The change to the layer's output.

        Args:
            x: (B, L, inputs).
            active: (B,), how many components act on each item.

        Returns:
            (B, L, outputs), float32.
        """
        x = x.to(self.A.dtype)
        M_t = (torch.arange(self.rank, device=x.device) < active[:, None]).to(x.dtype)[:, None]  # (B, 1, r)
        start = F.linear(F.linear(x, self.A_init) * (self.S_init * M_t), self.B_init)
        return F.linear(F.linear(x, self.A) * (self.S * M_t), self.B) - start


class TLoRA(Method):
    """A masked low-rank change to every attention projection; the placeholder reads a rare word's embedding."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.timesteps: int = base.scheduler.config.num_train_timesteps
        self.changes = LayerModules(
            {
                path: MaskedLowRank(layer.in_features, layer.out_features, config.rank, config.orthogonal)
                for path, layer in attention_projections(base).items()
            }
        )

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": list(self.parameters()), "lr": c.lr, "weight_decay": c.weight_decay}]
        return [Stage("changes", c.steps, c.batch_size, groups)]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return Batch.of(images.instance_rows(size, generator), [self.say("a photo of {}")] * size)

    def active(self, rank: int, t: Tensor) -> Tensor:
        """r(t) of sec. 3.4: floor((r - r_min) ((T - t) / T)^alpha) + r_min, of each timestep.

        Args:
            rank: r of the layer.
            t: (B,) timesteps, 0 to 999.
        """
        c = self.config
        if not c.masked:
            return torch.full_like(t, rank)
        least = min(c.min_rank, rank)
        share = ((self.timesteps - t.double()) / self.timesteps) ** c.alpha
        return (share * (rank - least)).long() + least

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return attached(base, self, lambda transformer: self._inside(base, transformer))

    def _inside(self, base: BaseModel, transformer: str) -> AbstractContextManager[Any]:
        layers = attention_projections(base, [transformer])
        return hooked(*self.changes.hooks(layers, lambda change: self._adding(base, change)))

    def _adding(self, base: BaseModel, change: MaskedLowRank) -> Callable:
        def add(layer: nn.Module, args: tuple[Tensor], original: Tensor) -> Tensor:
            return original + change(args[0], self.active(change.rank, base.call.t)).to(original.dtype)

        return add
