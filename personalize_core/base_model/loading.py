"""Base models by name, hub id or local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from personalize_core.base_model.parts import (
    FILES,
    INDEX,
    PARTS,
    SECOND_ENCODER,
    Layout,
    check_vae,
    load_parts,
    network_files,
)
from personalize_core.base_model.pretrained import CONFIG
from personalize_core.errors import InputError, listed
from personalize_core.files.hub import hub_folder
from personalize_core.files.outside import is_folder, user_path
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
        if not (MINI / INDEX).is_file():
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

    from personalize_core.base_model.model import BaseModel

    parts = load_parts(_layout(name, identity))
    base = BaseModel(
        name=name,
        revision=identity.revision,
        weights_hash=identity.weights_hash,
        device=choose_device(device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        image_size=image_size,
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


def _layout(name: str, identity: Identity) -> Layout:
    """Where its parts lie on this machine; fetched from the hub, if they are of the hub and not in its cache."""
    if identity.revision == "local":
        return Layout(Path(identity.source))
    what, published = f"the base model {name!r}", PUBLISHED.get(name)
    otherwise = "or give a folder with its files in diffusers' layout, or work with the embedded model, 'mini'"
    other_vae = None
    if published and published.vae:
        other_vae = hub_folder(f"the autoencoder of {what}", *published.vae, network_files("vae"), otherwise, check_vae)
    root = hub_folder(
        what,
        identity.source,
        identity.revision,
        FILES,
        otherwise,
        lambda root: Layout(root, other_vae).check_weights(),
    )
    return Layout(root, other_vae)


def _of_hub(name: str, published: Published) -> Identity:
    where = f"{published.hub_id}@{published.revision}"
    hashes = {part: where for part in (*PARTS, "unet_config", *published.more_parts)}
    if published.vae:
        hashes["vae"] = "@".join(published.vae)
    return Identity(name, published.hub_id, published.revision, tuple(hashes.items()))


def _local(name: str, folder: Path) -> Identity:
    layout = Layout(folder)
    layout.check_pickles()
    hashes = {part: folder_hash(folder / part) for part in (*layout.parts, *layout.tokenizers, "scheduler")}
    hashes["unet_config"] = sha256(folder / "unet" / CONFIG)
    if layout.is_xl:  # it says what an empty prompt reads
        hashes["model_index"] = sha256(folder / INDEX)
    return Identity(name, os.fspath(folder), "local", tuple(hashes.items()))
