"""A network from a folder in diffusers' or transformers' layout: all its weights are the folder's, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from personalize_core.compat import hide_bars_of_transformers
from personalize_core.errors import InputError, listed, said_by, shown
from personalize_core.files.outside import is_there, read_json_object, refuse_pickles_in

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG = "config.json"
NO_WEIGHTS = "position_ids"  # buffers that old files of CLIP hold: 0, 1, 2, ...


def load_network(kind: Any, folder: Path, dtype: Any = None) -> Any:
    """The network in a folder, in evaluation mode.

    diffusers and transformers fill weights that a file lacks with random numbers, and leave out those that the network
    has no place for; both only log it.

    Args:
        kind: its class, or a class of transformers that chooses one, such as AutoModel.
        dtype: None: float32; "auto" (of transformers): as the file has it.

    Raises:
        InputError: a file is missing or damaged; the configuration describes no such network; weights are missing, have
            another shape or no place in it; or one is not finite. The sentence names the file, and the weight.
    """
    import torch
    from diffusers.models.modeling_utils import ModelMixin

    is_of_diffusers = issubclass(kind, ModelMixin)
    weights = weights_in(folder, "diffusion_pytorch_model" if is_of_diffusers else "model")
    config = folder / CONFIG
    if is_of_diffusers:
        check_settings(kind, config)
    else:
        read_json_object(config)
    hide_bars_of_transformers()
    options: dict[str, Any] = {"torch_dtype" if is_of_diffusers else "dtype": dtype or torch.float32}
    if not is_of_diffusers:
        options["trust_remote_code"] = False
    with _unlogged():
        try:
            network, report = kind.from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:  # the weights' files are whole, so it is the configuration; of many classes
            raise InputError(f"{config} describes no {kind.__name__} that can be built: {said_by(error)}") from error
    _check_report(network, report, weights)
    check_finite(network, weights)
    return network.eval()


def weights_in(folder: Path, stem: str) -> Path:
    """The file of weights that the libraries read: one, or the index of several.

    Raises:
        InputError: there is none, or one is damaged.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if is_there(single):
        files = [single]
    elif is_there(index):
        parts = read_json_object(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
            raise InputError(f"{index} should say in which file each weight is, as `weight_map`; save it again")
        files = [folder / name for name in sorted(set(parts.values()))]
    else:
        if folder.is_dir():
            refuse_pickles_in(folder)
        raise InputError(f"{folder} holds no weights; put {single.name} there")
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except FileNotFoundError:
            raise InputError(f"{file} does not exist; {index} names it") from None
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} is no safetensors file, or a damaged one; fetch or save it again ({said_by(error)})"
            ) from None
    return single if files == [single] else index


def check_settings(kind: Any, path: Path) -> Mapping[str, Any]:
    """The settings in a configuration file of a class of diffusers, each of the type that the class says.

    Raises:
        InputError: one has another type, or the file is no JSON, or of another class of networks.
    """
    config, hints = read_json_object(path), get_type_hints(kind.__init__)
    for name, value in config.items():
        if name in hints and not _is_of(value, hints[name]):
            raise InputError(f"{path}: {name} is {shown(value)}, and should be {_in_words(hints[name])}")
    return config


def _check_report(network: nn.Module, report: Mapping[str, Any], weights: Path) -> None:
    called = type(network).__name__
    if shapes := {name: (tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]}:
        first, *_ = _in_order(shapes, network)
        found, wanted = shapes[first]
        raise InputError(
            f"{weights} holds {first} of shape {found}, and its {CONFIG} describes one of shape {wanted}; "
            "take both from the same network"
        )
    unread = {name for name, weight in network.named_parameters() if weight.is_meta}  # diffusers trusts an index
    if missing := _in_order(unread.union(report["missing_keys"]), network):
        raise InputError(
            f"{weights} lacks {_some(missing)} of a {called} as its {CONFIG} describes it; fetch or save both again"
        )
    from transformers import PreTrainedModel

    own = {name for name, _ in network.named_children()}
    extra = [name for name in report["unexpected_keys"] if not name.endswith(NO_WEIGHTS)]
    if isinstance(network, PreTrainedModel):  # its file may hold more than this network, such as CLIP's other half
        extra = [name for name in extra if name.split(".")[0] in own]
    if extra:
        raise InputError(
            f"{weights} holds {_some(sorted(extra))}, for which a {called} as its {CONFIG} describes it has no "
            "place; take both from the same network"
        )


def check_finite(network: nn.Module, weights: Path) -> None:
    """Raise InputError if a number that was read from this file is none."""
    # a sum is a look at each weight in a tenth of the time that reading takes, and finite only if all are
    for name, weight in network.named_parameters():
        if not _is_finite(weight):
            raise InputError(f"{weights} holds numbers that are not finite, in {name}; fetch or save it again")


def _is_finite(weight: torch.Tensor) -> bool:
    return bool(weight.detach().sum().isfinite()) or bool(weight.detach().isfinite().all())


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} weights, first {names[0]}," if len(names) > 1 else f"the weight {names[0]}"


def _in_order(names: Any, network: nn.Module) -> list[str]:
    """As they stand in the network; the libraries give sets."""
    place = {name: number for number, name in enumerate(network.state_dict())}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def _is_of(value: Any, hint: Any) -> bool:
    """Is a value of JSON what a type asks for?

    Tuples are lists there, of any length. null is written for a switch that is off, as in the U-Net of the published
    Stable Diffusion XL, and for a choice that is left open, as by diffusers' DPM-Solver; diffusers reads both so.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in args)
    if origin is Literal:
        return value is None or value in args
    if origin in (tuple, list):
        return isinstance(value, list) and all(_is_of(each, args[0]) for each in value)
    if hint in (tuple, list):
        return isinstance(value, list)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is bool:
        return value is None or isinstance(value, bool)
    if hint in (str, type(None)):
        return isinstance(value, hint)
    return hint is Any


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(each) for each in args))
    if origin is Literal:
        return f"one of {listed(args)}"
    if origin in (tuple, list):
        return f"a list of which each is {_in_words(args[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, "a list")


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within it diffusers and transformers log only errors: what else they would say of weights is refused here."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(logging, logging.get_verbosity()) for logging in (of_diffusers, of_transformers)]
    try:
        for logging, _ in before:
            logging.set_verbosity(logging.CRITICAL)  # type: ignore[attr-defined]
        yield
    finally:
        for logging, level in before:
            logging.set_verbosity(level)
