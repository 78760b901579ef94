"""The encoders that scores compare with: images or texts in, rows of length one out.

Each encoder is one set of weights, one way of preparing an image and one feature, as in Radford et al. 2021
(CLIP), Caron et al. 2021 (DINO) and the evaluation script of Kumari et al. 2023 (CustomConcept101), whose
preprocessing of DINO we follow. Scores of two encoders never compare, so an encoder says exactly what it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.errors import InputError, listed
from personalize_core.files.stamps import sha256
from personalize_core.metrics.encoder_names import MINI_WEIGHTS, PUBLISHED

BATCH_SIZE = 32
THREADS = min(8, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else min(8, os.cpu_count() or 1)
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Encoder(Protocol):
    """Turns images into features. The three properties are written beside every score."""

    @property
    def name(self) -> str:
        """Such as "dino-s16"; or the name of the folder it came from."""
        ...

    @property
    def weights_hash(self) -> str:
        """sha256 of the weights file."""
        ...

    @property
    def preprocessing(self) -> str:
        """What happens to an image before the network sees it, in words."""
        ...

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length one."""
        ...


class TextImageEncoder(Encoder, Protocol):
    """An encoder that puts texts into the same space."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length one. What exceeds the context length is cut off."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """An image of any size to (3, crop, crop)."""

    size: int  # pixels; the shorter side after resizing
    crop: int  # pixels; the central square that is kept
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False  # both sides become `size`, whatever the image's shape

    def __str__(self) -> str:
        resize = f"both sides to {self.size}" if self.squash else f"shorter side to {self.size}"
        return (
            f"RGB; {resize}, {self.interpolation}; centre crop {self.crop}; "
            f"values in [0, 1]; mean {list(self.mean)}; std {list(self.std)}"
        )

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Images to (N, 3, crop, crop). Resizing is Pillow's, on 8-bit values, as in the original tools."""
        pixels = np.stack(list(in_threads(self._square, images)))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def _square(self, image: Image.Image) -> np.ndarray:
        """(crop, crop, 3) uint8."""
        image = image.convert("RGB")
        width, height = image.size
        if self.squash:
            width = height = self.size
        else:
            short = min(width, height)
            width, height = self.size * width // short, self.size * height // short
        image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


@dataclass(frozen=True)
class Clip:
    """A CLIP model of open_clip. Implements TextImageEncoder; the features are the projected embeddings."""

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    tokenizer: Callable[[list[str]], Tensor]  # (N, L) token ids, cut off at the model's context length
    device: str

    @property
    def preprocessing(self) -> str:
        return str(self.prepare)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        return in_batches(lambda some: self.model.encode_image(self.prepare(some).to(self.device)), images, "images")

    def texts(self, texts: Sequence[str]) -> Tensor:
        return in_batches(
            lambda some: self.model.encode_text(self.tokenizer(list(some)).to(self.device)), texts, "texts"
        )


@dataclass(frozen=True)
class VisionTransformer:
    """A ViTModel of transformers. Implements Encoder; the feature is the class token after the final norm."""

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    device: str

    @property
    def preprocessing(self) -> str:
        return str(self.prepare)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        def class_token(some: Sequence[Image.Image]) -> Tensor:
            return self.model(self.prepare(some).to(self.device)).last_hidden_state[:, 0]

        return in_batches(class_token, images, "images")


def in_threads(function: Callable[[Any], Any], items: Iterable) -> Iterable:
    """As map, in order, but in several threads: Pillow reads and resizes without holding Python's lock."""
    items = list(items)
    if len(items) == 1 or THREADS == 1:
        return map(function, items)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


@torch.inference_mode()
def in_batches(encode: Callable[[Sequence], Tensor], items: Sequence, what: str) -> Tensor:
    """Encode a few at a time, so that memory does not grow with the number of images."""
    if not len(items):
        raise ValueError(f"there are no {what} to encode")
    features = [encode(items[start : start + BATCH_SIZE]).float().cpu() for start in range(0, len(items), BATCH_SIZE)]
    return F.normalize(torch.cat(features), dim=1).clone()


# -- which encoders there are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Weights that others published: where they lie on the hub, and how our protocol feeds them."""

    repository: str
    revision: str  # a commit, so that the weights cannot change under us
    files: tuple[str, ...]  # the weights first
    width: int  # D, to tell a wrong local folder at once
    prepare: Preprocessing | None  # None: as the folder's own configuration says
    architecture: str = ""  # open_clip's name of it; "-quickgelu" is the activation that OpenAI trained with


CLIP_PREPROCESSING = Preprocessing(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TEXT_IMAGE = {
    "clip-b32": Published(
        *PUBLISHED["clip-b32"],
        ("open_clip_model.safetensors",),
        512,
        CLIP_PREPROCESSING,
        "ViT-B-32-quickgelu",
    ),
    "clip-l14": Published(
        *PUBLISHED["clip-l14"],
        ("open_clip_model.safetensors",),
        768,
        CLIP_PREPROCESSING,
        "ViT-L-14-quickgelu",
    ),
}
IDENTITY = {
    # CustomConcept101's way to prepare an image, and that of the model's own processor, as in OFT's script: straight
    # to 224 x 224. What else it does, the file says that is saved beside the weights.
    "dino-s16": Published(
        *PUBLISHED["dino-s16"],
        ("pytorch_model.bin", "config.json"),
        384,
        Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "dino-s16-stock": Published(
        *PUBLISHED["dino-s16-stock"],
        ("pytorch_model.bin", "config.json", "preprocessor_config.json"),
        384,
        None,
    ),
}


def load_text_image_encoder(name_or_folder: str | Path, device: str = "cpu") -> TextImageEncoder:
    """The encoder of CLIP-T and CLIP-I.

    Args:
        name_or_folder: "mini-clip", which comes with this package; "clip-b32" or "clip-l14", fetched from the
            hub; "clip-b32:PATH", the same from a local weights file or folder; or a folder that open_clip wrote
            (open_clip_config.json and weights), fed as its own configuration says.
        device: where the network runs; features come back to the CPU.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "mini-clip", MINI_WEIGHTS / "clip", TEXT_IMAGE)
    import open_clip  # two seconds: only who scores pays them

    if name in TEXT_IMAGE:
        known = TEXT_IMAGE[name]
        weights = the_weights(path or fetched(name, known), known.files)
        model = readable(name, weights, lambda: open_clip.create_model(known.architecture, pretrained=str(weights)))
        return Clip(
            name,
            sha256(weights),
            known.prepare or preprocessing_of_open_clip(weights.parent, model.visual.image_size),
            model.eval().requires_grad_(False).to(device),
            open_clip.get_tokenizer(known.architecture),
            device,
        )

    folder = existing_folder(name, path, "open_clip_config.json")
    weights = the_weights(folder, TEXT_IMAGE["clip-b32"].files)
    model = readable(name, weights, lambda: open_clip.create_model(f"local-dir:{folder}"))
    return Clip(
        name,
        sha256(weights),
        preprocessing_of_open_clip(folder, model.visual.image_size),
        model.eval().requires_grad_(False).to(device),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        device,
    )


def load_identity_encoder(name_or_folder: str | Path, device: str = "cpu") -> Encoder:
    """The encoder of the identity score, called DINO after its usual weights.

    Args:
        name_or_folder: "mini-identity", which comes with this package; "dino-s16" or "dino-s16-stock", fetched from the
            hub; "dino-s16:PATH", the same from a local folder; or a folder with a ViTModel that transformers wrote
            (config.json, weights, preprocessor_config.json), fed as its own configuration says.
        device: where the network runs; features come back to the CPU.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "mini-identity", MINI_WEIGHTS / "identity", IDENTITY)
    from transformers import ViTModel

    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    known = IDENTITY.get(name)
    if known and path is None:
        path = fetched(name, known)
    folder = existing_folder(name, path, "config.json")
    weights = the_weights(folder, ("model.safetensors", "pytorch_model.bin"))
    model, report = readable(
        name,
        weights,
        lambda: ViTModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True, local_files_only=True, dtype=torch.float32
        ),
    )
    if report["missing_keys"]:
        # transformers would fill them with random numbers and only log it
        raise InputError(f"{weights} lacks weights of a ViTModel, among them {sorted(report['missing_keys'])[0]!r}")
    if known and model.config.hidden_size != known.width:
        raise InputError(
            f"{folder} is not {name}: its features have width {model.config.hidden_size}, not {known.width}"
        )
    prepare = (known and known.prepare) or preprocessing_of_transformers(folder, model.config.image_size)
    return VisionTransformer(name, sha256(weights), prepare, model.eval().requires_grad_(False).to(device), device)


# -- finding and reading weights ------------------------------------------------------------------------------


def find(
    name_or_folder: str | Path, mini: str, mini_folder: Path, published: dict[str, Published]
) -> tuple[str, Path | None]:
    """(name, local path). The path is None for published weights that have to be fetched."""
    text = str(name_or_folder)
    if text == mini:
        return mini, mini_folder
    name, _, local = text.partition(":")
    if name in published:
        return name, Path(local) if local else None
    path = Path(text)
    if path.is_dir():
        return path.resolve().name, path
    raise InputError(
        f"there is no encoder {text!r}: known are {listed([mini, *published])}; or write the path of a folder "
        f"with weights, or {next(iter(published))}:PATH for the published weights if they lie on this machine"
    )


def existing_folder(name: str, path: Path | None, config: str) -> Path:
    if path is None or not (path / config).is_file():
        raise InputError(f"no weights for the encoder {name!r}: {path} does not hold {config}")
    return path


def the_weights(path: Path, preferred: Sequence[str]) -> Path:
    """The one weights file in a folder: it is hashed, so it must be certain which one is loaded."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    chosen = [path / name for name in preferred if path / name in found] or found
    if not chosen:
        raise InputError(f"{path} holds no weights: put {preferred[0]} there")
    if len(chosen) > 1:
        raise InputError(f"{path} holds several weights files ({', '.join(p.name for p in chosen)}): keep one")
    return chosen[0]


def fetched(name: str, known: Published) -> Path:
    """The folder on this machine that holds the published files; fetched from the hub at their pinned commit."""
    from huggingface_hub import constants, get_session, hf_hub_download

    def folder(local_files_only: bool) -> Path:
        return [
            Path(hf_hub_download(known.repository, file, revision=known.revision, local_files_only=local_files_only))
            for file in known.files
        ][0].parent

    try:
        return folder(local_files_only=True)
    except OSError:
        pass  # not in the hub's cache yet
    try:
        get_session().head(constants.ENDPOINT, timeout=5)  # without a network hf_hub_download retries for 20 s
        return folder(local_files_only=False)
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise InputError(
            f"the weights of {name!r} could not be fetched from the hub ({known.repository}): copy its "
            f"{listed(known.files)} into a folder and write '{name}:FOLDER', or use the mini encoders"
        ) from error


def readable(name: str, weights: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns; or one sentence instead of a library's screen of mismatched tensors."""
    try:
        return load()
    except Exception as error:
        first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"{weights} could not be read as the encoder {name!r}: {first_line}") from error


def preprocessing_of_open_clip(folder: Path, image_size: int | tuple[int, int]) -> Preprocessing:
    """As open_clip would prepare an image for scoring: its defaults, overlaid by the folder's own."""
    own = json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})
    side = image_size if isinstance(image_size, int) else image_size[0]
    resize_mode, interpolation = own.get("resize_mode", "shortest"), own.get("interpolation", "bicubic")
    if resize_mode not in ("shortest", "squash") or interpolation not in INTERPOLATIONS:
        raise InputError(
            f"{folder / 'open_clip_config.json'} asks for resize_mode {resize_mode!r} and interpolation "
            f"{interpolation!r}: only 'shortest' or 'squash', and {', '.join(INTERPOLATIONS)} are known here"
        )
    return Preprocessing(
        side,
        side,
        tuple(own.get("mean", CLIP_PREPROCESSING.mean)),
        tuple(own.get("std", CLIP_PREPROCESSING.std)),
        interpolation,
        squash=resize_mode == "squash",
    )


def preprocessing_of_transformers(folder: Path, image_size: int) -> Preprocessing:
    """As transformers' ViT image processor would prepare an image, from its preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(f"{folder} does not hold preprocessor_config.json, which says how to prepare an image")
    own = json.loads(path.read_text())
    size = own.get("size", image_size)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    side = shortest or (size["height"] if isinstance(size, dict) else size)
    interpolation = {int(filter): name for name, filter in INTERPOLATIONS.items()}.get(own.get("resample", 2))
    if interpolation is None or abs(own.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise InputError(f"{path} asks for a resampling or rescaling that is not known here")
    return Preprocessing(
        side, image_size, tuple(own["image_mean"]), tuple(own["image_std"]), interpolation, squash=shortest is None
    )
