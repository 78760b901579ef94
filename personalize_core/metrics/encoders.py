"""The encoders that scores compare with: images or texts in, rows of length one out.

Each encoder is one set of weights, one way of preparing an image and one feature, as in Radford et al. 2021
(CLIP), Caron et al. 2021 (DINO) and the evaluation script of Kumari et al. 2023 (CustomConcept101), whose
preprocessing of DINO we follow. Scores of two encoders never compare, so an encoder says exactly what it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.base_model.pretrained import check_finite
from personalize_core.errors import InputError, listed
from personalize_core.files.stamps import sha256
from personalize_core.metrics.encoder_names import FACES, find
from personalize_core.metrics.preprocessing import (
    Preprocessing,
    preprocessing_of_open_clip,
    preprocessing_of_transformers,
)
from personalize_core.metrics.weights import (
    IDENTITY,
    TEXT_IMAGE,
    Published,
    existing_folder,
    fetched,
    readable,
    the_weights,
)

BATCH_SIZE = 32
# model_type in config.json -> transformers' class
VISION_TRANSFORMERS = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov3_vit": "DINOv3ViTModel"}


class Encoder(Protocol):
    """Turns images into features. The first three properties are written beside every score."""

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

    @property
    def looks_for(self) -> str | None:
        """What it compares where an image may show none, such as "face"; None: it compares whole images."""
        ...

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length one; or of zeros, where what it looks for is not found."""
        ...


class TextImageEncoder(Encoder, Protocol):
    """An encoder that puts texts into the same space."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length one. What exceeds the context length is cut off."""
        ...


@dataclass(frozen=True)
class Clip:
    """A CLIP model of open_clip. Implements TextImageEncoder; the features are the projected embeddings."""

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    tokenizer: Callable[[list[str]], Tensor]  # (N, L) token ids, cut off at the model's context length
    device: str
    looks_for = None

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
    """A ViT of transformers: DINO, DINOv2 (Oquab et al. 2023) or DINOv3 (Simeoni et al. 2025). Implements Encoder.

    The feature is the class token after the final norm.
    """

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    device: str
    looks_for = None

    @property
    def preprocessing(self) -> str:
        return str(self.prepare)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        def class_token(some: Sequence[Image.Image]) -> Tensor:
            return self.model(self.prepare(some).to(self.device)).last_hidden_state[:, 0]

        return in_batches(class_token, images, "images")


@dataclass(frozen=True)
class SigLip:
    """SigLIP 2 at a fixed size (Tschannen et al. 2025), a SiglipModel of transformers. Implements TextImageEncoder.

    The features are those of its attention pooling. It was trained on texts in lower case of 64 tokens, padding among
    them (sec. 2.1), so that is how texts are read here, whatever the tokenizer's file says.
    """

    name: str
    weights_hash: str
    prepare: Preprocessing
    model: Any
    tokenizer: Any
    device: str
    looks_for = None

    @property
    def preprocessing(self) -> str:
        return f"{self.prepare}; texts in lower case, padded to {self.context_length} tokens"

    @property
    def context_length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        def pooled(some: Sequence[Image.Image]) -> Tensor:
            return self.model.vision_model(pixel_values=self.prepare(some).to(self.device)).pooler_output

        return in_batches(pooled, images, "images")

    def texts(self, texts: Sequence[str]) -> Tensor:
        return in_batches(self._pooled_texts, texts, "texts")

    def _pooled_texts(self, texts: Sequence[str]) -> Tensor:
        lower = [words.lower() for words in texts]
        options = {"padding": "max_length", "max_length": self.context_length, "truncation": True}
        tokens = self.tokenizer(lower, return_tensors="pt", **options)["input_ids"].to(self.device)
        return self.model.text_model(input_ids=tokens).pooler_output


@torch.inference_mode()
def in_batches(encode: Callable[[Sequence], Tensor], items: Sequence, what: str) -> Tensor:
    """Encode a few at a time, so that memory does not grow with the number of images."""
    if not len(items):
        raise ValueError(f"there are no {what} to encode")
    features = [encode(items[start : start + BATCH_SIZE]).float().cpu() for start in range(0, len(items), BATCH_SIZE)]
    return F.normalize(torch.cat(features), dim=1).clone()


@contextmanager
def no_warnings_logged() -> Iterator[None]:
    """Within the block no library logs a warning; errors are logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def load_text_image_encoder(name_or_folder: str | Path, device: str = "cpu") -> TextImageEncoder:
    """The encoder of CLIP-T and CLIP-I.

    Args:
        name_or_folder: "mini-clip", which comes with this package; "clip-b32", "clip-l14" or "siglip2-b16", fetched
            from the hub, and so on (encoder_names.PUBLISHED); "clip-b32:PATH", the same from a local safetensors file
            or folder; or a folder that open_clip wrote (open_clip_config.json and weights), or transformers with a
            SiglipModel (config.json, weights, tokenizer), fed as its own configuration says.
        device: where the network runs; features come back to the CPU.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "text_image")
    known = TEXT_IMAGE.get(name)
    if known and not known.architecture:
        return _siglip(name, existing_folder(name, path or fetched(name, known), "config.json"), known, device)
    if path and not known and (path / "config.json").is_file() and not (path / "open_clip_config.json").is_file():
        return _siglip(name, path, None, device)

    import open_clip  # two seconds: only who scores pays them

    if known:
        weights = the_weights(path or fetched(name, known), known.files)
        model = readable(name, weights, lambda: open_clip.create_model(known.architecture, pretrained=str(weights)))
        check_finite(model, weights)
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

    def from_folder() -> Any:
        with no_warnings_logged():  # that its weights are random, before they are loaded
            made: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        open_clip.load_checkpoint(made, str(weights))  # this file: open_clip itself might take a pickle beside it
        return made

    model = readable(name, weights, from_folder)
    check_finite(model, weights)
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
            hub, and so on (encoder_names.PUBLISHED); "dino-s16:PATH", the same from a local folder; or a folder with a
            ViTModel, Dinov2Model or DINOv3ViTModel that transformers wrote (config.json, weights,
            preprocessor_config.json), fed as its own configuration says; or "sface:FOLDER", which compares faces.
        device: where the network runs; features come back to the CPU. Faces are compared on the CPU.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "identity")
    if name == FACES:
        from personalize_core.metrics.faces import load_faces

        assert path is not None
        return load_faces(name, path)
    import transformers

    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()

    known = IDENTITY.get(name)
    if known and path is None:
        path = fetched(name, known)
    folder = existing_folder(name, path, "config.json")
    weights = the_weights(folder, ("model.safetensors",))
    network = network_of(folder, VISION_TRANSFORMERS)
    options = {"add_pooling_layer": False} if network == "ViTModel" else {}
    model = of_transformers(name, getattr(transformers, network), folder, weights, **options)
    check_width(name, folder, model.config.hidden_size, known)
    prepare = (known and known.prepare) or preprocessing_of_transformers(folder, model.config.image_size)
    return VisionTransformer(name, sha256(weights), prepare, model.to(device), device)


def _siglip(name: str, folder: Path, known: Published | None, device: str) -> SigLip:
    """The SiglipModel of transformers in that folder."""
    from transformers import AutoTokenizer, SiglipModel

    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    network_of(folder, {"siglip": "SiglipModel"})
    weights = the_weights(folder, ("model.safetensors",))
    model = of_transformers(name, SiglipModel, folder, weights)
    vision = model.config.vision_config
    check_width(name, folder, vision.hidden_size, known)
    prepare = preprocessing_of_transformers(folder, vision.image_size)
    tokenizer = readable(name, folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return SigLip(name, sha256(weights), prepare, model.to(device), tokenizer, device)


def check_width(name: str, folder: Path, width: int, known: Published | None) -> None:
    """Raise InputError if features of this width are not those of the published encoder, None: of no published one."""
    if known and width != known.width:
        raise InputError(f"{folder} is not {name}: its features have width {width}, not {known.width}")


def network_of(folder: Path, known: Mapping[str, str]) -> str:
    """The class of transformers that a folder's config.json asks for.

    Raises:
        InputError: none of the known.
    """
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text())["model_type"]
        return known[model_type]
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path} names no model_type that is known here: {listed(known)}") from None


def of_transformers(name: str, network: Any, folder: Path, weights: Path, **options: Any) -> Any:
    """The network in that folder in float32, frozen.

    Raises:
        InputError: weights are missing, which transformers would fill with random numbers and only log; or one is not
            finite.
    """
    model, report = readable(
        name,
        weights,
        lambda: network.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            **options,
        ),
    )
    if report["missing_keys"]:
        raise InputError(
            f"{weights} lacks weights of a {network.__name__}, among them {sorted(report['missing_keys'])[0]!r}"
        )
    check_finite(model, weights)
    return model.eval().requires_grad_(False)
