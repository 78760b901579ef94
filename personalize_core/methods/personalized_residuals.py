"""Personalized Residuals, and localized attention-guided (LAG) sampling.

Ham et al., "Personalized Residuals for Concept-Driven Text-to-Image Generation", CVPR 2024, arXiv:2405.12978.
Section and equation numbers below are that paper's. No code was released; what the paper leaves open is decided
in methods.md section 9 and said here where it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from personalize_core.base import BaseModel, hooked
from personalize_core.concept import Concept
from personalize_core.data import Preprocessing
from personalize_core.files import save_tensors
from personalize_core.method import Method, Stage, options
from personalize_core.text import TextContext


@options
class Config:
    """Defaults are the paper's (sec. 4.1), for Stable Diffusion 1.4."""

    rank_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05  # rank of a residual, as a share of its layer's channels
    initial: Literal["base_model", "gaussian"] = "base_model"  # see Residual
    steps: Annotated[int, Field(gt=0)] = 150
    batch_size: Annotated[int, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0)] = 1e-3


@options
class Sampling:
    """How a trained artifact is used; both ways from the same residuals."""

    lag: bool = False  # keep the residuals to the region that attends to the concept (sec. 3.3)
    # The paper does not say what the prompt-free half of guidance does: "reuse" the mask of the same picture's
    # prompted half, have the residuals "off", or have them act in "full".
    lag_unconditional: Literal["reuse", "off", "full"] = "reuse"


class Residual(nn.Module):
    """The low-rank change A B to a 1x1 projection over m channels (sec. 3.2).

    Deviates from the paper, which starts both factors at random and so perturbs the model before the first step:
    B starts at zero here, and training starts from the base model. `initial: gaussian` is the literal reading.
    """

    def __init__(self, channels: int, rank: int, initial: str) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(channels, rank) * 0.02)
        self.B = nn.Parameter(torch.randn(rank, channels) * (0.02 if initial == "gaussian" else 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, m, h, w) before a convolution, (B, h*w, m) before a linear layer."""
        if x.ndim == 4:
            return F.conv2d(F.conv2d(x, self.B[..., None, None]), self.A[..., None, None])
        return F.linear(F.linear(x, self.B), self.A)


class PersonalizedResiduals(Method):
    """A residual on the output projection of every transformer block; no regularization images."""

    Config = Config
    Sampling = Sampling
    preprocessing = Preprocessing("crop", "bilinear", flip=False)

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.residuals = nn.ModuleDict()
        for layer, block in base.transformers.items():
            m = block.proj_out.weight.shape[0]
            rank = max(1, round(config.rank_fraction * m))
            self.residuals[layer.replace(".", "/")] = Residual(m, rank, config.initial)

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("residuals", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return hooked(
            *(
                block.proj_out.register_forward_hook(self._adding(self.residuals[layer.replace(".", "/")], layer, base))
                for layer, block in base.transformers.items()
            )
        )

    def _adding(self, residual: nn.Module, layer: str, base: BaseModel) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], original: Tensor) -> Tensor:
            change = residual(args[0])
            if self.training or not self.sampling.lag:
                return original + change
            inside = self._region(base.call.context, base.call.maps.on(layer, base.call.context.concept))
            # eq. 3, (1 - M) f + M f': where M is zero, not one bit of the base model's features changes
            return torch.where(like_features(inside, original), original + change, original)

        return hook

    def _region(self, context: TextContext, attention: Tensor) -> Tensor:
        """M of eq. 3, (B, h*w) bool, from how much each location looks at the concept's words."""
        own = above_median(attention)
        match self.sampling.lag_unconditional:
            case "reuse":
                return own[context.partner]
            case "off":
                return own & ~context.unconditional[:, None]
            case _:
                return own | context.unconditional[:, None]

    def export(self, base: BaseModel, folder: Path) -> str:
        tensors = {}
        for layer, block in base.transformers.items():
            residual: Any = self.residuals[layer.replace(".", "/")]
            for name, factor in (("lora_A", residual.B), ("lora_B", residual.A)):  # PEFT computes B(A x)
                axes = factor.shape + (1, 1) * isinstance(block.proj_out, nn.Conv2d)
                tensors[f"unet.{layer}.proj_out.{name}.weight"] = factor.reshape(axes)
        save_tensors(folder / "pytorch_lora_weights.safetensors", tensors)
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        return (
            f'pipe.load_lora_weights("pytorch_lora_weights.safetensors"), and write {said!r} in prompts. (Without LAG.)'
        )


def above_median(attention: Tensor) -> Tensor:
    """(B, h*w) to bool, strictly above. A row that looks nowhere at the concept is all False."""
    return attention > attention.median(dim=-1, keepdim=True).values


def like_features(inside: Tensor, features: Tensor) -> Tensor:
    """Give inside (B, h*w) the axes of (B, m, h, w) or (B, h*w, m) features."""
    return inside.view(len(features), 1, *features.shape[2:]) if features.ndim == 4 else inside[..., None]
