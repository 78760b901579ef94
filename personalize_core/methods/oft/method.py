"""Orthogonal fine-tuning (OFT), and its constrained form (COFT).

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv:2306.07280.
Where the paper and the authors' code differ, we follow the code, except in the number of steps and in the word that
stands for the concept: the base model's rare word, as for every method, where the code has "qwe".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from personalize_core.base_model.model import BaseModel, hooked
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError, listed, shown
from personalize_core.files.atomic import save_tensors, write_json
from personalize_core.files.outside import read_json_object
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.oft.recipe import Config
from personalize_core.methods.shared.interchange import file_in, fill, read_tensors
from personalize_core.methods.shared.lag import apart, attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections, stored
from personalize_core.methods.shared.merged_weights import merged
from personalize_core.methods.shared.training_batches import with_prior

TEMPLATE = "a photo of {}"
ADAPTER, IN_PEFT = "adapter_model.safetensors", "base_model.model."


class Rotation(nn.Module):
    """A block-diagonal rotation R of a layer's input: the layer computes W0 R^T x + b.

    R_i = (I - S_i) (I + S_i)^-1 with S_i = (A_i - A_i^T) / 2, Cayley's parametrization as the authors' code has it;
    the paper writes (I + Q) (I - Q)^-1, the same family with Q = -S. With `rescaled` the weight is diag(s) W0 R^T,
    and s = exp(log_scale): the paper asks for a positive factor, and this keeps it so.
    """

    def __init__(self, in_features: int, out_features: int, r: int, block_share: bool, rescaled: bool) -> None:
        super().__init__()
        self.r = r
        self.A = nn.Parameter(torch.zeros(1 if block_share else r, in_features // r, in_features // r))
        self.log_scale = nn.Parameter(torch.zeros(out_features)) if rescaled else None

    def skew(self) -> Tensor:
        """S, (r, n, n), or (1, n, n) if the blocks are one."""
        return (self.A - self.A.mT) / 2

    def blocks(self) -> Tensor:
        """R_1 to R_r, (r, n, n)."""
        with _full_precision(self.A):
            S, identity = self.skew(), torch.eye(self.A.shape[-1], device=self.A.device, dtype=self.A.dtype)
            # The factors commute. I + S has an inverse for every skew S, so no solution needs a check, for which a
            # graphics card would wait: once a layer and step.
            solved, _ = torch.linalg.solve_ex(identity + S, identity - S, check_errors=False)
            return solved.expand(self.r, -1, -1)

    def turn(self, x: Tensor, blocks: Tensor) -> Tensor:
        """R^T x, for x (..., in_features) and R's blocks."""
        with _full_precision(x):
            turned = torch.einsum("...ri,rij->...rj", x.to(blocks.dtype).unflatten(-1, (self.r, -1)), blocks)
            return turned.flatten(-2).to(x.dtype)

    def rescale(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """s W x + b from y = W x + b, (..., out_features)."""
        assert self.log_scale is not None
        change = torch.expm1(self.log_scale) * (y if bias is None else y - bias)  # exactly 0 while s is 1
        return (y + change).to(y.dtype)

    def merged(self, W: Tensor) -> Tensor:
        """diag(s) W R^T, of (outputs, inputs)."""
        with _full_precision(W):
            W = torch.einsum("orj,rij->ori", W.unflatten(-1, (self.r, -1)), self.blocks()).flatten(1)
        return W if self.log_scale is None else W + torch.expm1(self.log_scale)[:, None] * W

    @torch.no_grad()
    def constrain(self, eps: float) -> None:
        """COFT: project each A_i onto the ball of radius eps n^2 / sqrt(blocks stored), in the Frobenius norm.

        After the authors' code. The paper bounds R - I itself, and says nothing of the scaling.
        """
        stored, n, _ = self.A.shape
        norm = torch.linalg.matrix_norm(self.A, keepdim=True)
        radius = eps * n**2 / stored**0.5
        self.A *= torch.where(norm > radius, radius / norm, 1.0)


class OFT(Method):
    """A rotation of the input of every attention projection; angles between neurons stay as they were.

    The placeholder reads the base model's rare word, as with every method that learns no embedding (the authors
    write "qwe"). COFT's projection comes after each step of the optimizer; in the authors' code it comes before the
    next forward pass, which sees the same weights.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        layers = attention_projections(base)
        for layer in layers.values():
            _check_divides(config.r, layer.in_features)
        self.rotations = LayerModules(
            {
                path: Rotation(layer.in_features, layer.out_features, config.r, config.block_share, config.rescaled)
                for path, layer in layers.items()
            }
        )

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": list(self.parameters()), "lr": c.lr}]
        return [Stage("rotations", c.steps, c.batch_size, groups, after_step=self._constrain)]

    def _constrain(self, index: int) -> None:
        if self.config.coft:
            for _, rotation in self.rotations.by_path():
                rotation.constrain(self.config.eps)

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        if not apart(self):
            return merged(base, {path: rotation.merged for path, rotation in self.rotations.by_path()})
        turns = {path: self._turning(self.rotations.of(path)) for path in attention_projections(base)}
        return attached(base, self, lambda transformer: self._inside(base, transformer, turns))

    def _inside(self, base: BaseModel, transformer: str, turns: dict[str, Callable]) -> AbstractContextManager[Any]:
        handles = []
        for path, layer in attention_projections(base, [transformer]).items():
            handles.append(layer.register_forward_pre_hook(turns[path]))
            if self.config.rescaled:
                handles.append(layer.register_forward_hook(_rescaling(self.rotations.of(path))))
        return hooked(*handles)

    def _turning(self, rotation: Rotation) -> Callable:
        fixed = None if self.training else rotation.blocks()  # else 128 equations would be solved in every step

        def turn(layer: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
            return (rotation.turn(args[0], rotation.blocks() if fixed is None else fixed),)

        return turn

    def export(self, base: BaseModel, folder: Path) -> str:
        if self.config.rescaled:
            raise InputError("PEFT's OFT has no factor for each output neuron, so rescaled OFT cannot be exported")
        tensors = {}
        for path in attention_projections(base):
            S = self.rotations.of(path).skew()
            above, right = torch.triu_indices(*S.shape[1:], offset=1)
            tensors[f"{IN_PEFT}{path}.oft_R.weight"] = S[:, above, right]
        save_tensors(folder / "oft" / ADAPTER, tensors)
        adapter = {
            "peft_type": "OFT",
            "r": self.config.r,
            "oft_block_size": 0,  # PEFT takes one of the two
            "block_share": self.config.block_share,
            "coft": False,  # nothing is left to constrain
            "use_cayley_neumann": False,  # the exact inverse, not its series
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
            "bias": "none",
            "inference_mode": True,
        }
        write_json(folder / "oft" / "adapter_config.json", adapter)
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        how = 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "oft").merge_and_unload()'
        return f"{how}, and write {said!r} in prompts."

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> OFT:
        """PEFT's folder, or one with it in "oft", with the number of blocks given, not their size."""
        folder = path / "oft" if (path / "oft").is_dir() else path
        about, tensors = read_adapter(folder)
        changes = {"r": about["r"], "block_share": bool(about.get("block_share")), "rescaled": False}
        method = cls(dataclasses.replace(config, **changes, coft=False, eps=Config().eps), base, concept)
        for name, start in method.rotations.named_parameters():
            tensors.setdefault(name, torch.zeros_like(start))  # a layer without one is not turned
        fill(method.rotations.named_parameters(), tensors, folder)
        return method


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's description of an OFT adapter, and A of each layer, (blocks, n, n), by the names of `OFT.rotations`.

    Raises:
        InputError: there is none, it is damaged, or it means something else than ours.
    """
    tensors, about, found = read_tensors(file_in(folder, ADAPTER)), _adapter(folder), {}
    if not about.get("r"):  # the size of the blocks is given instead
        raise InputError(f"{folder} has blocks of one size, which number differently in wide and narrow layers")
    for name, above in tensors.items():
        if above.ndim != 2 or not name.endswith(".oft_R.weight"):
            raise InputError(
                f"{folder} holds {shown(name)}, in the form of another release of PEFT's; save it with 0.21"
            )
        n = round((1 + (1 + 8 * above.shape[1]) ** 0.5) / 2)  # above.shape[1] = n (n - 1) / 2
        S = above.new_zeros(len(above), n, n)
        S[(slice(None), *torch.triu_indices(n, n, offset=1))] = above
        layer = name.removeprefix(IN_PEFT).removesuffix(".oft_R.weight")
        found[f"{stored(layer)}.A"] = (S - S.mT).float()
    return about, found


def _adapter(folder: Path) -> dict[str, Any]:
    """PEFT's description of an OFT adapter that means what ours does."""
    try:
        about = read_json_object(folder / "adapter_config.json")
    except InputError as error:
        raise InputError(
            f"{folder} holds no adapter of PEFT's: adapter_config.json is missing or damaged ({error})"
        ) from None
    if about.get("peft_type") != "OFT":
        raise InputError(f"{folder} holds an adapter of type {about.get('peft_type')}, not OFT")
    special = [key for key in ("use_cayley_neumann", "coft", "modules_to_save") if about.get(key)]
    if special or about.get("bias", "none") != "none":
        raise InputError(f"{folder} holds an adapter with {listed(special or ['bias'])}, which cannot be imported")
    return about


def _rescaling(rotation: Rotation) -> Callable:
    return lambda layer, args, y: rotation.rescale(y, layer.bias)


def _full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """A rotation in half precision would not be one: its columns would be off unit length by a hundredth."""
    return torch.autocast(like.device.type, enabled=False)


def _check_divides(r: int, width: int) -> None:
    if width % r:
        raise InputError(f"{r} blocks do not divide a layer of width {width}; OFT needs equal blocks")
    if width == r:
        raise InputError(f"{r} blocks of a layer of width {width} have one row each, which cannot turn; take fewer")
