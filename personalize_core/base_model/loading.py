"""Base models by name, hub id or local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from personalize_core.errors import InputError, listed, shown
from personalize_core.files.outside import is_folder, read_json_object, refuse_pickles_in, user_path
from personalize_core.files.stamps import folder_hash, sha256, stamp_of

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel

MINI = Path(__file__).parents[1] / "mini" / "weights" / "base"


@dataclass(frozen=True)
class Published:
    """A base model on the hub, with the revision that its name stands for."""

    hub_id: str
    revision: str
    note: str
    more_parts: tuple[str, ...] = ()  # beside `PARTS`
    vae: tuple[str, str] | None = None  # hub id and revision of another autoencoder than its own


SECOND_ENCODER = "text_encoder_2"  # of Stable Diffusion XL
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"
_SDXL_VAE_FOR_HALF = "madebyollin/sdxl-vae-fp16-fix", "207b116dae70ace3637169f1ddd2434b91b3a8cd"
PUBLISHED = {
    "sd-1.4": Published(
        "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b", "512 px, predicts noise"
    ),
    "sd-1.5": Published(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "512 px, predicts noise",
    ),
    "sd-2.1-base": Published(
        "stabilityai/stable-diffusion-2-1-base", "5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06", "512 px, predicts noise"
    ),
    "sd-2.1": Published(
        "stabilityai/stable-diffusion-2-1", "5cae40e6a2745ae2b01ad92ae5043f95f23644d6", "768 px, predicts velocity"
    ),
    "sdxl-base-1.0": Published(*_SDXL, "1024 px, predicts noise", (SECOND_ENCODER,)),
    "sdxl-base-1.0-fp16-vae": Published(
        *_SDXL, "the same, with an autoencoder that half precision suffices for", (SECOND_ENCODER,), _SDXL_VAE_FOR_HALF
    ),
}
NAMES = ("mini", *PUBLISHED)

PARTS = ("text_encoder", "vae", "unet")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[0-9a-f]{40}))?")
_loaded: WeakSet[BaseModel] = WeakSet()  # in this process


@dataclass(frozen=True)
class Identity:
    """Which weights exactly: what a result made with them depends on."""

    name: str  # as the user chose it
    source: str  # a folder, or a hub id
    revision: str  # the hub's commit, or "local"
    hashes: tuple[tuple[str, str], ...]  # (part, hash of its files); "unet_config" apart, for it says the image size

    def hash_of(self, part: str) -> str:
        return dict(self.hashes)[part]

    @property
    def weights_hash(self) -> str:
        return stamp_of(dict(self.hashes))


def is_address(name: str) -> bool:
    """Is it written as a folder or a hub id is, and not as one of `NAMES`?"""
    return "/" in name or "\\" in name or name.startswith((".", "~"))


def identify(name: str) -> Identity:
    """Which weights `name` stands for; reads local files, and asks no hub.

    Raises:
        InputError: `name` is neither known, nor a folder with a Stable Diffusion, nor a hub id with its revision.
    """
    if name == "mini":
        if not (MINI / "model_index.json").is_file():
            raise InputError(f"the embedded base model is missing from {MINI}; install the package again")
        return _local(name, MINI)
    if name in PUBLISHED:
        return _of_hub(name, PUBLISHED[name])
    folder = user_path(name)
    if is_folder(folder):
        return _local(name, folder.resolve())
    match = _HUB_ID.fullmatch(name)
    if match and match["revision"]:
        return _of_hub(name, Published(match["id"], match["revision"], ""))
    known = f"known are {listed(NAMES)}, a folder in diffusers' layout, or a hub id"
    if match:
        raise InputError(
            f"{name!r} is neither a folder here nor a base model that is known by name; if it is a hub id, pin its "
            f"revision, as {name}@<40-digit commit>, so that the same name gives the same weights next year. "
            f"({known[0].upper()}{known[1:]})"
        )
    raise InputError(f"there is no base model {name!r}; {known} with its revision")


@lru_cache(maxsize=1)
def load_base_model(
    name: str, device: str = "auto", precision: str = "fp32", image_size: int | None = None
) -> BaseModel:
    """Load a base model and keep it for the next call of the process.

    Args:
        device: "cpu", "cuda", or "auto" for the GPU where there is one.
        precision: "fp32" or "bf16" for the U-Net.
        image_size: side length in pixels; None: its native one.

    Raises:
        InputError: the weights cannot be had here, or it cannot make images of this size.
    """
    identity = identify(name)

    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from personalize_core.base_model.model import BaseModel
    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    where: dict[str, Any] = {"revision": identity.revision} if identity.revision != "local" else {}
    vae_where: dict[str, Any] = {"pretrained_model_name_or_path": identity.source, "subfolder": "vae", **where}
    if name in PUBLISHED and (vae := PUBLISHED[name].vae):
        vae_where = {"pretrained_model_name_or_path": vae[0], "revision": vae[1]}
    more: dict[str, Any] = {}
    try:
        parts: dict[str, Any] = {
            "scheduler": DDPMScheduler.from_pretrained(identity.source, subfolder="scheduler", **where),
            "tokenizer": CLIPTokenizer.from_pretrained(identity.source, subfolder="tokenizer", **where),
            "text_encoder": CLIPTextModel.from_pretrained(
                identity.source, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True, **where
            ),
            "vae": AutoencoderKL.from_pretrained(torch_dtype=torch.float32, use_safetensors=True, **vae_where),
            "unet": UNet2DConditionModel.from_pretrained(
                identity.source, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True, **where
            ),
        }
        if _needs_second_encoder(parts["unet"].config, name):
            parts |= {
                "tokenizer_2": CLIPTokenizer.from_pretrained(identity.source, subfolder="tokenizer_2", **where),
                SECOND_ENCODER: CLIPTextModelWithProjection.from_pretrained(
                    identity.source, subfolder=SECOND_ENCODER, dtype=torch.float32, use_safetensors=True, **where
                ),
            }
            pipeline: Any = DiffusionPipeline.load_config(identity.source, **where)
            more["empty_prompt_is_zero"] = pipeline.get("force_zeros_for_empty_prompt", True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # gone, or damaged
        raise InputError(
            f"the base model {name!r} ({identity.source}) cannot be loaded: {_first_sentence(error)} Give a folder "
            "with its files in diffusers' layout, or work with the embedded model, 'mini'"
        ) from error
    base = BaseModel(
        name=name,
        revision=identity.revision,
        weights_hash=identity.weights_hash,
        device=choose_device(device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        image_size=image_size,
        **parts,
        **more,
    )
    _loaded.add(base)
    return base


@contextmanager
def aside() -> Iterator[None]:
    """Within it, no base model of this process lies on a graphics card: for who waits until others have used it."""
    there = [base for base in _loaded if base.device.type != "cpu"]
    for base in there:
        base.move("cpu")
        base.give_back_memory()
    try:
        yield
    finally:
        for base in there:
            base.move(base.device)


def choose_device(device: str) -> str:
    """ "auto" is the GPU where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no GPU here; use 'auto' or 'cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _needs_second_encoder(config: Mapping[str, Any], name: str) -> bool:
    """Is the U-Net told of pooled text and sizes, as Stable Diffusion XL's?

    Raises:
        InputError: it is told of something else.
    """
    told = config.get("addition_embed_type")
    if told not in (None, "text_time"):
        raise InputError(
            f"the base model {name!r} is told of {shown(told)} beside the text, which Stable Diffusion 1, 2 and XL are "
            "not; take one of these"
        )
    return told is not None


def _of_hub(name: str, published: Published) -> Identity:
    where = f"{published.hub_id}@{published.revision}"
    hashes = {part: where for part in (*PARTS, "unet_config", *published.more_parts)}
    if published.vae:
        hashes["vae"] = "@".join(published.vae)
    return Identity(name, published.hub_id, published.revision, tuple(hashes.items()))


def _local(name: str, folder: Path) -> Identity:
    parts, tokenizers = [*PARTS], ["tokenizer"]
    is_xl = (folder / "unet/config.json").is_file() and _needs_second_encoder(
        read_json_object(folder / "unet/config.json"), name
    )
    if is_xl:
        parts, tokenizers = [*parts, SECOND_ENCODER], [*tokenizers, "tokenizer_2"]
    needed = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    missing = [file for file in [*needed, *["model_index.json"] * is_xl] if not (folder / file).is_file()]
    for each in tokenizers:
        if not any((folder / each / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            missing.append(f"{each}/tokenizer.json")
    if missing:
        raise InputError(f"{folder} is no Stable Diffusion in diffusers' layout: it has no {listed(missing)}")
    for part in parts:
        if not list((folder / part).glob("*.safetensors")):
            refuse_pickles_in(folder / part)
    folders = (*parts, *tokenizers, "scheduler")
    hashes = {part: folder_hash(folder / part) for part in folders}
    hashes["unet_config"] = sha256(folder / "unet/config.json")
    if is_xl:  # it says what an empty prompt reads
        hashes["model_index"] = sha256(folder / "model_index.json")
    return Identity(name, os.fspath(folder), "local", tuple(hashes.items()))


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".") + "."
