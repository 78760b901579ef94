"""Files that other programs read and write: embeddings, low-rank changes, whole networks. Safetensors only.

An embedding is written twice. diffusers takes the word from the tensor's name. AUTOMATIC1111's web UI and ComfyUI take
it from the file's name, and from a file with one tensor that tensor whatever its name, which by their users' custom is
"emb_params"; the web UI's own layout, "string_to_param", exists only as a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import save_tensors

EMBEDDING, LORA = "learned_embeds.safetensors", "pytorch_lora_weights.safetensors"
_FACTOR = re.compile(r"unet\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")  # as PEFT names them
_ALPHA = re.compile(r"(\.lora_A\.weight)?\.alpha$")  # behind the layer's name, or its first factor's
PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})


def save_embedding(vector: Tensor, concept: Concept, folder: Path) -> str:
    """Write a (D,) embedding in both layouts; returns how diffusers loads it."""
    save_tensors(folder / EMBEDDING, {concept.placeholder: vector[None]})
    save_tensors(folder / "embeddings" / f"{concept.name}.safetensors", {"emb_params": vector[None]})
    return f'pipe.load_textual_inversion("{EMBEDDING}")'


def elsewhere(concept: Concept) -> str:
    """How the embedding's other file is used."""
    return (
        f"AUTOMATIC1111's web UI and ComfyUI read embeddings/{concept.name}.safetensors, and know it as "
        f"{concept.name!r} and 'embedding:{concept.name}'."
    )


def refuse_pickle(path: Path) -> None:
    """Raise InputError if a file's name ends as pickles' do."""
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} is a pickle, which may run any program when it is read, so it is not read here; convert it to "
            "safetensors where you trust it"
        )


def read_tensors(path: Path, inside: str) -> dict[str, Tensor]:
    """A safetensors file, or the one called `inside` in a folder.

    Raises:
        InputError: there is none, it is a pickle, or it is damaged.
    """
    file = path / inside if path.is_dir() else path
    if not file.is_file():
        for beside in path.iterdir() if path.is_dir() else []:
            refuse_pickle(beside)
    refuse_pickle(file)
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        raise InputError(f"{file} is no safetensors file, or a damaged one") from None


def read_embedding(path: Path, width: int) -> Tensor:
    """(D,) float32: one embedding, in either layout."""
    tensors = read_tensors(path, EMBEDDING)
    if len(tensors) != 1:
        raise InputError(f"{path} holds {len(tensors)} tensors, {listed(tensors)}; an embedding's file holds one")
    ((name, tensor),) = tensors.items()
    vectors = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    if vectors.shape[1] != width:
        raise InputError(
            f"{path}: the embedding {name!r} is {vectors.shape[1]} wide, this base model's words are {width}; it was "
            "learned for another family of Stable Diffusion"
        )
    if len(vectors) != 1:
        raise InputError(f"{path}: the embedding {name!r} is {len(vectors)} vectors; a concept here is one")
    return vectors[0].float()


def read_lora(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer of the U-Net -> (A (r, n), B (m, r)) float32, where the layer's weight changes by B A.

    Read by diffusers itself, so in any layout that it knows; what the file scales by alpha is scaled here.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = path / LORA if path.is_dir() else path
    raw = read_tensors(path, LORA)  # to refuse what diffusers would explain at length, unpickle, or leave out
    if any("dora_scale" in name or "magnitude_vector" in name for name in raw):
        raise InputError(f"{path} is more than a low-rank change: it has the factors of DoRA")
    found: Any = StableDiffusionPipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True, return_lora_metadata=True
    )
    state, alphas, about = found
    about = {key.removeprefix("unet."): value for key, value in (about or {}).items()}
    special = [key for key in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if about.get(key)]
    if special:
        raise InputError(f"{path} is more than a low-rank change: {listed(special)}")
    factors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in convert_unet_state_dict_to_peft(state).items():
        match = _FACTOR.fullmatch(name)
        if not match:
            raise InputError(f"{path} holds {name!r}, which is no low-rank change to the U-Net")
        factors[match["side"]][match["layer"]] = tensor.float().flatten(1)
    down, up = factors["A"], factors["B"]
    if down.keys() != up.keys() or not down:
        raise InputError(f"{path} does not hold two factors for each layer")
    scales = {_ALPHA.sub("", name): alpha for name, alpha in convert_unet_state_dict_to_peft(alphas or {}).items()}
    changes = {}
    for layer, A in down.items():
        alpha = scales.get(f"unet.{layer}", about.get("lora_alpha", len(A)))
        changes[layer] = A, up[layer] * (alpha / len(A))
    return changes


def with_rank(A: Tensor, B: Tensor, rank: int, path: Path) -> tuple[Tensor, Tensor]:
    """The same change B A with factors of that rank: what is added is zero."""
    missing = rank - len(A)
    if missing < 0:
        raise InputError(f"{path} holds a change of rank {len(A)}, but the method's configuration has room for {rank}")
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), missing)], dim=1)


@torch.no_grad()
def fill(learned: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a method's own of the same names.

    Raises:
        InputError: names or shapes differ, so they are of another network.
    """
    own = dict(learned)
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise InputError(
            f"{path} does not fit: it {'lacks' if different[0] in own else 'also has'} {different[0]}"
            + (f", and {len(different) - 1} more differ" if len(different) > 1 else "")
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            shapes = [" x ".join(map(str, each.shape)) for each in (tensor, own[name])]
            raise InputError(f"{path} does not fit this base model: {name} is {shapes[0]}, and should be {shapes[1]}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def read_network(kind: Any, folder: Path) -> dict[str, Tensor]:
    """The weights, in float32, of a network that `kind.save_pretrained` saved; `kind` is one of the libraries'.

    Raises:
        InputError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {kind.__name__} in diffusers' layout")
    try:
        return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True).float().state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
