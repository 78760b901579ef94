"""Orthogonal fine-tuning (OFT), and its constrained form (COFT).

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv:2306.07280.
Where the paper and the authors' code differ, we follow the code, except in the number of steps and in the word that
stands for the concept: the base model's rare word, as for every method, where the code has "qwe".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError, listed, shown
from personalize_core.files.atomic import save_tensors, write_json
from personalize_core.files.outside import read_json_object
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.oft.recipe import Config
from personalize_core.methods.shared.interchange import PEFT_ADAPTER, file_in, fill, read_tensors
from personalize_core.methods.shared.lag import apart, attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections, computing, stored
from personalize_core.methods.shared.merged_weights import merged
from personalize_core.methods.shared.training_batches import with_prior

TEMPLATE = "a photo of {}"
Linear = Callable[[Tensor], Tensor]
"""A layer: (..., in_features) -> (..., out_features)."""

IN_PEFT = "base_model.model."


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
        return skew(self.A)

    def blocks(self) -> Tensor:
        """R_1 to R_r, (r, n, n)."""
        return cayley(self.skew()).expand(self.r, -1, -1)

    def turn(self, x: Tensor, blocks: Tensor) -> Tensor:
        """R^T x, for x (..., in_features) and R's blocks."""
        with _full_precision(x):
            parts = x.to(blocks.dtype).reshape(-1, self.r, blocks.shape[-1]).transpose(0, 1)  # (r, N, n)
            return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape).to(x.dtype)

    def turned_weight(self, weight: Tensor, blocks: Tensor) -> Tensor:
        """W0 R^T, (out_features, in_features): R turns every row of W0."""
        return self.turn(weight, blocks.mT)

    def linear(self, x: Tensor, layer: nn.Linear, blocks: Tensor) -> Tensor:
        """W0 R^T x + b, (..., out_features).

        R turns whichever has fewer rows: the features of all positions, or the weight. The gradient of a turned weight
        takes another product over all positions, so the weight needs half as many.
        """
        if x.shape[:-1].numel() > 2 * layer.out_features:
            return F.linear(x, self.turned_weight(layer.weight, blocks), layer.bias)
        return F.linear(self.turn(x, blocks), layer.weight, layer.bias)

    def rescale(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """s W x + b from y = W x + b, (..., out_features)."""
        assert self.log_scale is not None
        change = torch.expm1(self.log_scale) * (y if bias is None else y - bias)  # exactly 0 while s is 1
        return (y + change).to(y.dtype)

    def merged(self, W: Tensor) -> Tensor:
        """diag(s) W R^T, of (outputs, inputs)."""
        W = self.turned_weight(W, self.blocks())
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
        layers = attention_projections(base)
        linears = self._learning(base, layers) if self.training else nullcontext(self._fixed(layers))
        return self._attached(base, linears)

    @contextmanager
    def _attached(self, base: BaseModel, linears: AbstractContextManager[dict[str, Linear]]) -> Iterator[None]:
        with linears as by_path, attached(base, self, lambda layer: self._inside(base, layer, by_path)):
            yield

    @contextmanager
    def _learning(self, base: BaseModel, layers: dict[str, nn.Linear]) -> Iterator[dict[str, Linear]]:
        """What each layer computes, where every pass through the U-Net solves for the blocks anew."""
        rotations, solved = dict(self.rotations.by_path()), dict[str, Tensor]()

        def solve(unet: nn.Module, args: tuple) -> None:
            solved.clear()
            solved.update(solve_together(rotations))

        def linear(path: str, layer: nn.Linear) -> Linear:
            return lambda x: rotations[path].linear(x, layer, solved[path])

        with hooked(base.unet.register_forward_pre_hook(solve)):
            yield {path: linear(path, layer) for path, layer in layers.items()}

    def _fixed(self, layers: dict[str, nn.Linear]) -> dict[str, Linear]:
        """What each layer computes, with its weight turned once for all passes."""
        rotations = dict(self.rotations.by_path())
        solved = solve_together(rotations)

        def linear(weight: Tensor, bias: Tensor | None) -> Linear:
            return lambda x: F.linear(x, weight, bias)

        weights = {path: rotations[path].turned_weight(layer.weight, solved[path]) for path, layer in layers.items()}
        return {path: linear(weights[path], layer.bias) for path, layer in layers.items()}

    @contextmanager
    def _inside(self, base: BaseModel, transformer: str, linears: dict[str, Linear]) -> Iterator[None]:
        layers = attention_projections(base, [transformer])
        rescaled = layers.items() if self.config.rescaled else []
        hooks = [layer.register_forward_hook(_rescaling(self.rotations.of(path))) for path, layer in rescaled]
        with hooked(*hooks), computing({layer: linears[path] for path, layer in layers.items()}):
            yield

    def export(self, base: BaseModel, folder: Path) -> str:
        if self.config.rescaled:
            raise InputError("PEFT's OFT has no factor for each output neuron, so rescaled OFT cannot be exported")
        tensors = {}
        for path in attention_projections(base):
            S = self.rotations.of(path).skew()
            above, right = torch.triu_indices(*S.shape[1:], offset=1)
            tensors[f"{IN_PEFT}{path}.oft_R.weight"] = S[:, above, right]
        save_tensors(folder / "oft" / PEFT_ADAPTER, tensors)
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


def skew(A: Tensor) -> Tensor:
    """(A - A^T) / 2 of every matrix, (..., n, n)."""
    return (A - A.mT) / 2


def cayley(S: Tensor) -> Tensor:
    """(I - S) (I + S)^-1 of every skew matrix, (..., n, n)."""
    with _full_precision(S):
        identity = torch.eye(S.shape[-1], device=S.device, dtype=S.dtype)
        # The factors commute. I + S has an inverse for every skew S, so no solution needs a check, for which a
        # graphics card would wait.
        solved, _ = torch.linalg.solve_ex(identity + S, identity - S, check_errors=False)
        return solved


def solve_together(rotations: Mapping[str, Rotation]) -> dict[str, Tensor]:
    """`Rotation.blocks` of all layers, by path; those of equal shape in one batch."""
    alike: dict[torch.Size, list[str]] = {}
    for path, rotation in rotations.items():
        alike.setdefault(rotation.A.shape, []).append(path)
    solved: dict[str, Tensor] = {}
    for paths in alike.values():
        A = torch.stack([rotations[path].A for path in paths])
        solved |= zip(paths, cayley(skew(A)).unbind(), strict=True)
    return {path: solved[path].expand(rotation.r, -1, -1) for path, rotation in rotations.items()}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's description of an OFT adapter, and A of each layer, (blocks, n, n), by the names of `OFT.rotations`.

    Raises:
        InputError: there is none, it is damaged, or it means something else than ours.
    """
    tensors, about, found = read_tensors(file_in(folder, PEFT_ADAPTER)), _adapter(folder), {}
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
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _check_divides(r: int, width: int) -> None:
    if width % r:
        raise InputError(f"{r} blocks do not divide a layer of width {width}; OFT needs equal blocks")
    if width == r:
        raise InputError(f"{r} blocks of a layer of width {width} have one row each, which cannot turn; take fewer")
