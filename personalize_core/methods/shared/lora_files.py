"""LoRA files of other programs: the low-rank change that they make to each layer. Safetensors only.

All programs name a layer by its path in diffusers' U-Net or transformers' text encoder, and differ in what they put
around it. kohya's trainers: `lora_unet_` or `lora_te_`, the path with underscores, `.lora_down.weight`, and the layer's
alpha; of Stable Diffusion XL `lora_te1_` and `lora_te2_`, and the U-Net's blocks by their numbers in Stability's code.
diffusers: `unet.` or `text_encoder.`, the path, `.lora_A.weight` (until 0.21 `.lora.down.weight`); its first releases:
the path without a prefix, the projection behind `.processor.`. PEFT: `base_model.model.`, the path, `.lora_A.weight`,
and alpha in adapter_config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personalize_core.errors import InputError, listed, shown
from personalize_core.files.outside import parse_json, read_json_object
from personalize_core.methods.shared.interchange import (
    LORA,
    PEFT_ADAPTER,
    check_tensors,
    file_in,
    read_metadata,
    read_tensors,
)

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel

PEFT_CONFIG = "adapter_config.json"
UNET, TEXT_ENCODER, SECOND = "unet", "text_encoder", "text_encoder_2"
Changes = dict[str, tuple[Tensor, Tensor]]
"""Path of a layer -> A (r, inputs) and B (outputs, r), float32: the layer's weight changes by B A."""

_FACTOR = re.compile(
    r"(?P<layer>.+)(?:\.lora_(?P<now>A|B|down|up)|[._]lora\.(?P<old>down|up)|\.lora_linear_layer\.(?P<text>down|up))"
    r"\.weight"
)
_PREFIXES = {  # the longest first
    "lora_unet_": UNET, "unet_": UNET, "lora_te1_": TEXT_ENCODER, "lora_te2_": SECOND, "lora_te_": TEXT_ENCODER,
    "text_encoder_2_": SECOND, "text_encoder_": TEXT_ENCODER,
}  # fmt: skip
_IN_SIDE = re.compile(r"(?P<side>down|up)_blocks_(?P<block>\d+)_attentions_(?P<number>\d+)_(?P<rest>.+)")
_MIDDLE = "mid_block_attentions_0_"
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders
_OF_SDXL = ("lora_te1_", "lora_te2_", "text_encoder_2.", "lora_unet_input_blocks_", "lora_unet_output_blocks_")
_IN_XL_ALONE = re.compile(r"up_blocks_0_attentions_|transformer_blocks_[1-9]|add_embedding_")  # of its U-Net
_NOT_IN_XL = re.compile(r"(down_blocks_0|up_blocks_3)_attentions_")
_OTHER_KINDS = {  # what a file has beside two plain factors -> marks of it in tensors' names
    "DoRA": (".dora_scale", "magnitude_vector"),
    "LoHa, of LyCORIS": (".hada_",),
    "LoKr, of LyCORIS": (".lokr_",),
    "OFT": (".oft_", "oft_blocks", "oft_diag"),
    "(IA)3": (".on_input", "ia3_l"),
    "a Tucker decomposition, of LyCORIS": (".lora_mid", ".hada_t"),
}
_OTHER_SETTINGS = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias", "modules_to_save", "fan_in_fan_out")
_LOOK = "a LoRA's names look like lora_unet_LAYER.lora_down.weight or unet.LAYER.lora_A.weight"


@dataclass(frozen=True)
class LowRankChanges:
    """What a LoRA file changes."""

    unet: Changes = field(default_factory=dict)
    text_encoder: Changes = field(default_factory=dict)
    text_encoder_2: Changes = field(default_factory=dict)  # of Stable Diffusion XL

    def paths(self) -> list[str]:
        """Of all layers."""
        return [*self.unet, *self.text_encoder, *self.text_encoder_2]


def read_lora(path: Path, base: BaseModel) -> LowRankChanges:
    """A LoRA file, or a folder of diffusers' or PEFT's with one; what the file scales by alpha / rank is scaled here.

    Raises:
        InputError: it is no LoRA, a damaged one, one for another base model, or more than a low-rank change.
    """
    named = _part_folders(path)
    found: dict[str, Changes] = {UNET: {}, TEXT_ENCODER: {}, SECOND: {}}
    for file, only in named:
        for part, changes in _read_file(file, base, only).items():
            found[part] |= changes
    if not any(A.any() and B.any() for changes in found.values() for A, B in changes.values()):
        raise InputError(f"{path} changes nothing: in every layer one factor is zero, as before training")
    return LowRankChanges(**found)


def with_rank(A: Tensor, B: Tensor, rank: int, path: Path) -> tuple[Tensor, Tensor]:
    """The same change B A with factors of that rank: what is added is zero."""
    missing = rank - len(A)
    if missing < 0:
        raise InputError(f"{path} holds a change of rank {len(A)}, but the method's configuration has room for {rank}")
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), missing)], dim=1)


def check_held(changed: Iterable[str], held: Iterable[str], path: Path, what: str) -> None:
    """Check that a method has a place for every layer that a file changes.

    Args:
        what: the layers that the method changes, for the message.

    Raises:
        InputError: it has not.
    """
    if others := sorted(set(changed) - set(held)):
        raise InputError(
            f"{path} does not fit: it changes {len(others)} more layers, such as {listed(others[:3])}; this method "
            f"changes {what} alone, so train the LoRA for these alone"
        )


def _part_folders(path: Path) -> list[tuple[Path, str | None]]:
    """Files to read, each with the part of the base model that it is for, where its place says so."""
    if path.is_dir() and not (path / LORA).is_file():
        parts = [part for part in (UNET, TEXT_ENCODER, SECOND) if (path / part / PEFT_ADAPTER).is_file()]
        if parts:  # as PEFT's own DreamBooth example saves them
            return [(path / part / PEFT_ADAPTER, part) for part in parts]
        if (path / PEFT_ADAPTER).is_file():
            return [(path / PEFT_ADAPTER, None)]
    return [(file_in(path, LORA), None)]


def _read_file(file: Path, base: BaseModel, only: str | None) -> dict[str, Changes]:
    tensors = read_tensors(file, exempt=[".alpha"])
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in name for name in tensors for mark in marks):
            raise InputError(f"{file} is not a plain LoRA: it has the factors of {kind}; train a plain one instead")
    layers = {part: _layers_of(each) for part, each in base.text_encoders.items()}
    layers = {UNET: _layers_of(base.unet) | _numbered(base)} | layers
    _refuse_another_family(tensors, layers, only, file)
    alphas, sides = {}, {"down": {}, "up": {}}
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            alphas[_layer(name.removesuffix(".alpha"), layers, only, file)] = _alpha(tensor, name, file)
            continue
        match = _FACTOR.fullmatch(name)
        if not match:
            raise InputError(f"{file} holds {shown(name)}, which is no factor of a LoRA; {_LOOK}")
        side = {"A": "down", "B": "up"}.get(kind := match["now"] or match["old"] or match["text"], kind)
        sides[side][_layer(match["layer"], layers, only, file)] = tensor
    if sides["down"].keys() != sides["up"].keys() or not sides["down"]:
        raise InputError(f"{file} does not hold two factors for each layer; {_LOOK}")
    alpha_of_all = _alphas_of_parts(file)
    changes: dict[str, Changes] = {part: {} for part in layers}
    for (part, layer), down in sides["down"].items():
        A, B = _fitted(down, sides["up"][part, layer], layers[part][_underscored(layer)][1], layer, file)
        alpha = alphas.get((part, layer), alpha_of_all.get(part, len(A)))
        changes[part][layer] = A, B * (alpha / len(A))
    check_tensors({layer: B for each in changes.values() for layer, (_, B) in each.items()}, file)
    return changes


def _layers_of(network: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Path with underscores -> path and weight's shape, of every layer that a LoRA can change."""
    return {
        _underscored(path): (path, module.weight.shape)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _numbered(base: BaseModel) -> dict[str, tuple[str, torch.Size]]:
    """The layers of the U-Net's transformers by the names of Stability's code, as kohya's trainers write for XL.

    That numbers the parts of the U-Net's two sides throughout, from 0: its first convolution, the pairs of a residual
    block and a transformer, and on the way down the convolutions between the resolutions.
    """
    found, per_block = {}, base.unet.config.layers_per_block + 1
    for spelled, layer in _layers_of(base.unet).items():
        if match := _IN_SIDE.fullmatch(spelled):
            down = match["side"] == "down"
            number = int(match["block"]) * per_block + int(match["number"]) + down
            found[f"{'input' if down else 'output'}_blocks_{number}_1_{match['rest']}"] = layer
        elif spelled.startswith(_MIDDLE):
            found["middle_block_1_" + spelled.removeprefix(_MIDDLE)] = layer
    return found


def _underscored(path: str) -> str:
    """A layer's path in the form in which all programs agree; releases of transformers differ in "text_model."."""
    return path.replace(".", "_").removeprefix("text_model_")


def _layer(name: str, layers: Mapping[str, Mapping[str, Any]], only: str | None, file: Path) -> tuple[str, str]:
    """(part, path) of the layer that a file calls by this name."""
    plain, part = name.removeprefix("base_model.model.").replace(".processor.", ".").replace(".", "_"), only
    for prefix, of in _PREFIXES.items():
        if plain.startswith(prefix):
            plain, part = plain.removeprefix(prefix), of
            break
    for candidate in (part,) if part and part in layers else tuple(layers):
        for spelled in _spellings(_underscored(plain), candidate):
            if spelled in layers[candidate]:
                return candidate, layers[candidate][spelled][0]
    raise InputError(
        f"{file} holds {shown(name)}, which names no layer of this base model; it is no LoRA for its family of Stable "
        f"Diffusion, or its names are of a form that is not known here; {_LOOK}"
    )


def _refuse_another_family(
    names: Iterable[str], layers: Mapping[str, Mapping[str, Any]], only: str | None, file: Path
) -> None:
    """Refuse layers that are of the other family of Stable Diffusion, XL or not, and that the base model has not."""
    is_xl = SECOND in layers
    sought, family = (_NOT_IN_XL, "Stable Diffusion 1 or 2") if is_xl else (_IN_XL_ALONE, "Stable Diffusion XL")
    for name in names:
        found = sought.search(name.replace(".", "_"))
        foreign = found and not any(found[0] in spelled for spelled in layers[UNET])
        if foreign or (not is_xl and (name.startswith(_OF_SDXL) or only == SECOND)):
            raise InputError(
                f"{file} was trained for {family}, as {shown(name)} shows, and this base model is of another family; "
                "take one that was trained for its own"
            )


def _spellings(name: str, part: str) -> list[str]:
    """The name, and what diffusers' first releases meant by it."""
    if part == UNET:
        return [name, f"{name}_0"]  # to_out, for to_out.0
    return [name, *(name.removesuffix(old) + new for old, new in _OLD_PROJECTIONS.items() if name.endswith(f"_{old}"))]


def _fitted(down: Tensor, up: Tensor, shape: torch.Size, layer: str, file: Path) -> tuple[Tensor, Tensor]:
    """A (r, inputs) and B (outputs, r), float32, for a weight of this shape."""
    if any(side > 1 for side in shape[2:]):
        raise InputError(f"{file} changes {layer}, a convolution of {shape[2]} x {shape[3]}, which is not imported")
    rank = len(down) if down.ndim else 0
    if not rank or down.numel() != rank * shape[1] or up.ndim < 2 or up.numel() != rank * shape[0]:
        shapes = [" x ".join(map(str, each)) or "one number" for each in (down.shape, up.shape, shape[:2])]
        raise InputError(f"{file}: the factors of {layer} are {shapes[0]} and {shapes[1]}, its weight is {shapes[2]}")
    return down.reshape(rank, shape[1]).float(), up.reshape(shape[0], rank).float()


def _alpha(tensor: Tensor, name: str, file: Path) -> float:
    """A layer's alpha as kohya's trainers save it, of any type."""
    value = tensor.item() if tensor.numel() == 1 else None
    return _checked_alpha(value, name, file)


def _alphas_of_parts(file: Path) -> dict[str, float]:
    """Part of the base model -> the alpha of all its layers, as diffusers and PEFT write it down."""
    if file.name == PEFT_ADAPTER:
        about = read_json_object(file.with_name(PEFT_CONFIG))
        if about.get("peft_type") != "LORA":
            raise InputError(f"{file.parent} holds an adapter of type {shown(about.get('peft_type'))}, not LORA")
        _refuse_others(about, file)
        alpha = _checked_alpha(about.get("lora_alpha"), "lora_alpha", file)
        return {UNET: alpha, TEXT_ENCODER: alpha, SECOND: alpha}
    written = read_metadata(file).get("lora_adapter_metadata")
    about = parse_json(written, file) if written else {}
    if not isinstance(about, dict):
        raise InputError(f"{file}: its lora_adapter_metadata should be a JSON object, and is {shown(about)}")
    found = {}
    for part in (UNET, TEXT_ENCODER, SECOND):
        own = {key.removeprefix(f"{part}."): value for key, value in about.items() if key.startswith(f"{part}.")}
        _refuse_others(own, file)
        if "lora_alpha" in own:
            found[part] = _checked_alpha(own["lora_alpha"], f"{part}.lora_alpha", file)
    return found


def _refuse_others(about: Mapping[str, Any], file: Path) -> None:
    if others := [key for key in _OTHER_SETTINGS if about.get(key)]:
        raise InputError(f"{file} is not a plain LoRA: it was trained with {listed(others)}; train one without")


def _checked_alpha(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(
            f"{file}: {name} = {shown(value)}, which should be a number above 0; save it again with the alpha of its "
            "training"
        )
    return float(value)
