"""Files that other programs read and write: embeddings, whole networks, and what every reader shares. Safetensors only.

An embedding is written twice. diffusers takes the word from the tensor's name. AUTOMATIC1111's web UI and ComfyUI take
it from the file's name, and from a file with one tensor that tensor whatever its name, which by their users' custom is
"emb_params"; the web UI's own layout, "string_to_param", exists only as a pickle. Of Stable Diffusion XL it is a
pair. diffusers takes each half from a file of its own, as its training script writes them; the others take both from
one file, "clip_l" and "clip_g".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError, listed, shown
from personalize_core.files.atomic import save_tensors
from personalize_core.files.outside import PICKLES, read_json_object, refuse_pickle, refuse_pickles_in

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel
    from personalize_core.methods.interface import Method

EMBEDDING, SECOND_EMBEDDING = "learned_embeds.safetensors", "learned_embeds_2.safetensors"
LORA, PROCESSORS = "pytorch_lora_weights.safetensors", "pytorch_custom_diffusion_weights.safetensors"
PEFT_ADAPTER = "adapter_model.safetensors"
_LEARNED = re.compile(  # files in a folder of what a program learned; "_emb", of diffusers' advanced scripts
    "|".join(
        [
            *(re.escape(Path(name).stem) for name in (EMBEDDING, SECOND_EMBEDDING, LORA, PROCESSORS, PEFT_ADAPTER)),
            ".+_emb",
        ]
    )
)
_PARTS = ("unet", "text_encoder", "text_encoder_2", "oft", "peft")  # folders in it
PAIR: tuple[str, str] = ("clip_l", "clip_g")  # in the order of Stable Diffusion XL's text encoders
_DAMAGED = "the file was damaged in training or in saving; take another one"
LARGEST = 1e4  # weights and embeddings of Stable Diffusion stay below 100
_opened: ContextVar[set[Path] | None] = ContextVar("files that an import has read", default=None)
_ARCHITECTURE = (  # settings of a network's config.json that change what the same weights compute
    "down_block_types", "up_block_types", "mid_block_type", "block_out_channels", "layers_per_block",
    "transformer_layers_per_block", "attention_head_dim", "num_attention_heads", "cross_attention_dim",
    "norm_num_groups", "in_channels", "out_channels", "only_cross_attention", "dual_cross_attention",
    "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
)  # fmt: skip


def save_embedding(vector: Tensor, base: BaseModel, concept: Concept, folder: Path) -> str:
    """Write a (D,) embedding in both layouts; returns how diffusers loads it."""
    parts = vector[None].split(base.text_encoders.widths, dim=-1)  # (1, width) for each text encoder
    files = (EMBEDDING, SECOND_EMBEDDING)[: len(parts)]
    for file, part in zip(files, parts, strict=True):
        save_tensors(folder / file, {concept.placeholder: part})
    tensors = {"emb_params": vector[None]} if len(parts) == 1 else dict(zip(PAIR, parts, strict=True))
    save_tensors(folder / "embeddings" / f"{concept.name}.safetensors", tensors)
    if len(parts) == 1:
        return f'pipe.load_textual_inversion("{EMBEDDING}")'
    return ", ".join(
        f'pipe.load_textual_inversion("{file}", text_encoder=pipe.{part}, tokenizer=pipe.{tokenizer})'
        for file, part, tokenizer in zip(files, base.text_encoders, ("tokenizer", "tokenizer_2"), strict=True)
    )


def elsewhere(concept: Concept) -> str:
    """How the embedding's other file is used."""
    return (
        f"AUTOMATIC1111's web UI and ComfyUI read embeddings/{concept.name}.safetensors, and know it as "
        f"{concept.name!r} and 'embedding:{concept.name}'."
    )


def file_in(path: Path, inside: str) -> Path:
    """`path` itself, or the file called `inside` where `path` is a folder.

    Raises:
        InputError: there is no such file; where pickles are there instead, the message says how to convert them.
    """
    file = path / inside if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            refuse_pickles_in(path)
        raise InputError(f"{file} does not exist")
    refuse_pickle(file)
    return file


def read_tensors(file: Path, exempt: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a safetensors file, with `check_tensors` of them.

    Args:
        exempt: ends of names of tensors that hold no weights, and are returned unchecked.

    Raises:
        InputError: it is a pickle, it is damaged, or its numbers are no weights.
    """
    refuse_pickle(file)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError):
        raise InputError(f"{file} is no safetensors file, or a damaged one; fetch or save it again") from None
    if (files := _opened.get()) is not None:
        files.add(file)
    check_tensors({name: each for name, each in tensors.items() if not name.endswith(tuple(exempt))}, file)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file keeps beside its tensors."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors of a file can be learned weights.

    Raises:
        InputError: a tensor is empty or holds integers, a value is infinite, not a number or above `LARGEST`, or all
            values are zero.
    """
    any_value = False
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: {shown(name)} holds {tensor.dtype}, but weights are floating-point; {_DAMAGED}")
        if not tensor.numel():
            raise InputError(f"{path}: {shown(name)} is empty; {_DAMAGED}")
        largest = tensor.float().abs().max().item()
        if not math.isfinite(largest):
            raise InputError(f"{path}: {shown(name)} has values that are infinite or not a number; {_DAMAGED}")
        if largest > LARGEST:
            raise InputError(
                f"{path}: {shown(name)} has a value of {largest:.3g}, and no weight is that large; {_DAMAGED}"
            )
        any_value = any_value or largest > 0
    if not any_value:
        raise InputError(f"{path}: all values are zero; {_DAMAGED}")


def check_no_matrix_is_zero(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check whole weights; changes to weights may leave a layer as it is.

    Raises:
        InputError: all values of a matrix or a kernel are zero, which would silence its layer.
    """
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and tensor.numel() and not tensor.float().any():
            raise InputError(f"{path}: all values of {shown(name)} are zero; {_DAMAGED}")


def read_foreign(kind: type[Method], config: Any, base: BaseModel, concept: Concept, path: Path) -> Method:
    """What another program learned, read by `kind.imported`, with every exception turned into one sentence.

    Raises:
        InputError: it cannot be read, it does not fit, its numbers are no weights, or a folder holds more than was
            read of it.
    """
    token = _opened.set(opened := set())
    try:
        learner = kind.imported(config, base, concept, path)
        _check_nothing_left(path, opened)
        check_tensors({name: parameter.detach() for name, parameter in learner.named_parameters()}, path)
    except MemoryError:
        raise
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} cannot be imported: {error}") from error
    except Exception as error:  # whatever a library raises on a file that it does not understand
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise InputError(
            f"{path} is not in a form that {kind.__name__} can import ({type(error).__name__}: {reason}); "
            "`personalize export` writes the form that is expected"
        ) from error
    finally:
        _opened.reset(token)
    return learner


def _check_nothing_left(path: Path, opened: Iterable[Path]) -> None:
    """Check that of a folder everything was read that by its name was learned: part of it would sample something else.

    A pickle beside a safetensors file of its name is the same again. Of a folder within, such as a network's, one file
    read is enough: others are of another precision.
    """
    if not path.is_dir():
        return
    read, folders = {file.with_suffix("") for file in opened}, {file.parent for file in opened}
    left = [
        file
        for file in sorted(path.iterdir())
        if _LEARNED.fullmatch(file.stem) and _holds_weights(file) and file.with_suffix("") not in read
    ]
    parts = [path / part for part in _PARTS if (path / part).is_dir() and path / part not in folders]
    left += [part for part in parts if any(map(_holds_weights, part.iterdir()))]
    if left:
        names = listed(str(each.relative_to(path)) for each in left)
        raise InputError(
            f"{path} also holds {names}, which this method as it is configured does not read, and without which the "
            "rest would sample something else; import the folder by a method that learns all of it, or name the file, "
            "or a folder, with only what is to be read"
        )


def _holds_weights(file: Path) -> bool:
    return file.suffix.lower() in {".safetensors", *PICKLES} and file.is_file()


def read_embedding(path: Path, widths: Sequence[int]) -> Tensor:
    """(D,) float32: one embedding, in either layout; of two text encoders, their halves side by side.

    Args:
        widths: of the base model's words, for each of its text encoders.

    Raises:
        InputError: it cannot be read, does not fit, is half of a pair or a pair where one is wanted, or is zero.
    """
    file = file_in(path, EMBEDDING)
    if file.name == SECOND_EMBEDDING and file.with_name(EMBEDDING).is_file():
        file = file.with_name(EMBEDDING)  # whichever half is named, the pair is meant
    second, tensors = file.with_name(SECOND_EMBEDDING), read_tensors(file)
    in_one_file, in_two = tensors.keys() == set(PAIR), file.name == EMBEDDING and second.is_file()
    if len(widths) == 1:
        if in_one_file or in_two or file == second:
            raise InputError(
                f"{path} was learned for Stable Diffusion XL, whose embeddings are pairs ({listed(PAIR)} in one file, "
                f"or {SECOND_EMBEDDING} beside {EMBEDDING}); take one that was learned for this base model's family"
            )
        return _one(tensors, path, widths[0])
    if in_one_file:
        return torch.cat([_one({name: tensors[name]}, path, width) for name, width in zip(PAIR, widths, strict=True)])
    if not in_two:
        names = listed((name[:100] for name in tensors), 4)
        raise InputError(
            f"{path} holds {names}, and of Stable Diffusion XL an embedding is a pair: {PAIR[0]} and {PAIR[1]} in "
            f"one file, or {SECOND_EMBEDDING} beside {EMBEDDING}; take one that was learned for it"
        )
    return torch.cat([_one(tensors, path, widths[0]), _one(read_tensors(second), second, widths[1])])


def _one(tensors: Mapping[str, Tensor], path: Path, width: int) -> Tensor:
    if len(tensors) != 1:
        names = listed((name[:100] for name in tensors), 4)
        raise InputError(f"{path} holds {len(tensors)} tensors, {names}; an embedding's file holds one")
    ((name, tensor),) = tensors.items()
    vectors = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    if vectors.shape[1] != width:
        raise InputError(
            f"{path}: the embedding {shown(name)} is {vectors.shape[1]} wide, this base model's words are {width}; it "
            "was learned for another family of Stable Diffusion"
        )
    if len(vectors) != 1:
        raise InputError(f"{path}: the embedding {shown(name)} is {len(vectors)} vectors; a concept here is one")
    if not vectors.float().any():
        raise InputError(f"{path}: the embedding {shown(name)} is zero, and no word is; {_DAMAGED}")
    return vectors[0].float()


@torch.no_grad()
def fill(learned: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a method's own of the same names.

    Raises:
        InputError: names or shapes differ, so they are of another network.
    """
    own = dict(learned)
    check_shapes({name: tensor.shape for name, tensor in own.items()}, tensors, path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def check_shapes(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], path: Path) -> None:
    """
    Raises:
        InputError: names or shapes differ, so they are of another network.
    """
    if expected.keys() != tensors.keys():
        different = sorted(expected.keys() ^ tensors.keys())
        raise InputError(
            f"{path} does not fit: it {'lacks' if different[0] in expected else 'also has'} {different[0]}"
            + (f", and {len(different) - 1} more differ" if len(different) > 1 else "")
        )
    for name, tensor in tensors.items():
        if tuple(expected[name]) != tuple(tensor.shape):
            found, wanted = (" x ".join(map(str, shape)) for shape in (tensor.shape, expected[name]))
            raise InputError(f"{path} does not fit this base model: {name} is {found}, and should be {wanted}")


def read_network(network: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The weights, in float32, of a network of the same architecture, as diffusers and transformers save one.

    The file is read without building a network from its config.json, which could ask for one of any size.

    Args:
        network: the base model's network of this kind.
        folder: with config.json and weights: one file, shards of one, or one of another precision ("fp16").

    Raises:
        InputError: there is none, it is damaged, or its config.json describes another architecture.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {type(network).__name__} in diffusers' layout: it has no config.json")
    about, own = read_json_object(folder / "config.json"), _settings_of(network)
    for key in _ARCHITECTURE:
        if key in about and key in own and _as_json(about[key]) != _as_json(own[key]):
            raise InputError(
                f"{folder} does not fit this base model: its config.json has {key} = {shown(about[key])}, and the "
                f"base model has {shown(own[key])}"
            )
    tensors: dict[str, Tensor] = {}
    for file in _weights_in(folder):
        tensors |= read_tensors(file, exempt=["position_ids"])  # of CLIP, as transformers saved it until 4.31
    check_no_matrix_is_zero(tensors, folder)
    if not hasattr(network, "text_model"):  # which some releases of transformers put around a text encoder
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _settings_of(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)  # of transformers, of diffusers


def _weights_in(folder: Path) -> list[Path]:
    """The weights of a saved network: one file, or all shards of one."""
    found = sorted(folder.glob("*.safetensors"))
    whole = [path for path in found if path.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if len(found) == 1 or whole:
        return whole[:1] or found
    if not found:
        refuse_pickles_in(folder)
        raise InputError(f"{folder} holds no weights; put diffusion_pytorch_model.safetensors there")
    if len({path.name.rpartition("-of-")[2] for path in found}) == 1 and "-of-" in found[0].name:
        return found
    raise InputError(f"{folder} holds several files of weights, {listed(path.name for path in found)}; keep one")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
