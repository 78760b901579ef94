"""Base models by name, hub id or local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from personalize_core.errors import InputError, listed
from personalize_core.files.outside import is_folder, refuse_pickles_in, user_path
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
        return _on_hub(name, PUBLISHED[name].hub_id, PUBLISHED[name].revision)
    folder = user_path(name)
    if is_folder(folder):
        return _local(name, folder.resolve())
    match = _HUB_ID.fullmatch(name)
    if match and match["revision"]:
        return _on_hub(name, match["id"], match["revision"])
    known = f"known are {listed(NAMES)}, a folder in diffusers' layout, or a hub id"
    if match:
        raise InputError(
            f"{name!r} is neither a folder here nor a base model that is known by name; if it is a hub id, pin its "
            f"revision, as {name}@<40-digit commit>, so that the same name gives the same weights next year. "
            f"({known[0].upper()}{known[1:]})"
        )
    raise InputError(f"there is no base model {name!r}; {known} with its revision")


@lru_cache(maxsize=1)
def load_base_model(name: str, device: str = "auto", precision: str = "fp32") -> BaseModel:
    """Load a base model and keep it for the next call of the process.

    Args:
        device: "cpu", "cuda", or "auto" for the GPU where there is one.
        precision: "fp32" or "bf16" for the U-Net.

    Raises:
        InputError: the weights cannot be had here.
    """
    identity = identify(name)

    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTokenizer

    from personalize_core.base_model.model import BaseModel
    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    where: dict[str, Any] = {"revision": identity.revision} if identity.revision != "local" else {}
    try:
        parts: dict[str, Any] = {
            "scheduler": DDPMScheduler.from_pretrained(identity.source, subfolder="scheduler", **where),
            "tokenizer": CLIPTokenizer.from_pretrained(identity.source, subfolder="tokenizer", **where),
            "text_encoder": CLIPTextModel.from_pretrained(
                identity.source, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True, **where
            ),
            "vae": AutoencoderKL.from_pretrained(
                identity.source, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True, **where
            ),
            "unet": UNet2DConditionModel.from_pretrained(
                identity.source, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True, **where
            ),
        }
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
        **parts,
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


def _on_hub(name: str, hub_id: str, revision: str) -> Identity:
    return Identity(name, hub_id, revision, tuple((part, f"{hub_id}@{revision}") for part in (*PARTS, "unet_config")))


def _local(name: str, folder: Path) -> Identity:
    needed = ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS))
    missing = [file for file in needed if not (folder / file).is_file()]
    if not any((folder / "tokenizer" / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer/tokenizer.json")
    if missing:
        raise InputError(f"{folder} is no Stable Diffusion in diffusers' layout: it has no {listed(missing)}")
    for part in PARTS:
        if not list((folder / part).glob("*.safetensors")):
            refuse_pickles_in(folder / part)
    hashes = tuple((part, folder_hash(folder / part)) for part in PARTS)
    tokenizer = folder_hash(folder / "tokenizer")
    scheduler = folder_hash(folder / "scheduler")
    others = (("tokenizer", tokenizer), ("scheduler", scheduler), ("unet_config", sha256(folder / "unet/config.json")))
    return Identity(name, os.fspath(folder), "local", (*hashes, *others))


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".") + "."
