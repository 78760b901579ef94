"""Published encoders and segmenters: which files they have, how they are fed, and how weights are found and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from personalize_core.errors import InputError, listed, said_by
from personalize_core.files.hub import hub_files
from personalize_core.files.outside import refuse_pickle, refuse_pickles_in
from personalize_core.metrics.encoder_names import PUBLISHED
from personalize_core.metrics.preprocessing import CLIP_PREPROCESSING, Preprocessing


@dataclass(frozen=True)
class Published:
    """Weights that others published: where they lie on the hub, and how our protocol feeds them."""

    repository: str
    revision: str  # a commit, so that the weights cannot change under us
    licence: str  # of the weights
    gated: bool  # the hub gives them only to accounts that accepted their terms
    files: tuple[str, ...]  # the weights first
    width: int  # D, to tell a wrong local folder at once
    prepare: Preprocessing | None  # None: as the folder's own configuration says
    # open_clip's name of it; "-quickgelu" is the activation that OpenAI trained with. Empty: transformers loads it
    architecture: str = ""


AS_SAVED = ("model.safetensors", "config.json", "preprocessor_config.json")  # by transformers
WITH_TOKENIZER = (*AS_SAVED, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
        replace(CLIP_PREPROCESSING, crop_rounds_down=True),  # openai/clip-vit-large-patch14's processor, as in OFT's
        "ViT-L-14-quickgelu",
    ),
    "siglip2-b16": Published(*PUBLISHED["siglip2-b16"], WITH_TOKENIZER, 768, None),
    "siglip2-b16-256": Published(*PUBLISHED["siglip2-b16-256"], WITH_TOKENIZER, 768, None),
}
IDENTITY = {
    # CustomConcept101's way to prepare an image, and that of the model's own processor, as in OFT's script: straight
    # to 224 x 224. What else it does, the file says that is saved beside the weights.
    "dino-s16": Published(
        *PUBLISHED["dino-s16"],
        ("model.safetensors", "config.json"),
        384,
        Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "dino-s16-stock": Published(
        *PUBLISHED["dino-s16-stock"],
        AS_SAVED,
        384,
        None,
    ),
    "dinov2-s14": Published(*PUBLISHED["dinov2-s14"], AS_SAVED, 384, None),
    "dinov2-b14": Published(*PUBLISHED["dinov2-b14"], AS_SAVED, 768, None),
    "dinov3-s16": Published(*PUBLISHED["dinov3-s16"], AS_SAVED, 384, None),
    "dinov3-b16": Published(*PUBLISHED["dinov3-b16"], AS_SAVED, 768, None),
}
MASC = {
    "siglip2-so400m-naflex": Published(*PUBLISHED["siglip2-so400m-naflex"], WITH_TOKENIZER, 1152, None),
}
SEGMENTERS = {
    "clipseg": Published(  # Lueddecke & Ecker 2022, "Image Segmentation Using Text and Image Prompts"
        *PUBLISHED["clipseg"],
        (
            "model.safetensors", "config.json", "preprocessor_config.json", "vocab.json", "merges.txt",
            "tokenizer_config.json", "special_tokens_map.json",
        ),
        64,
        None,
    )
}  # fmt: skip


def existing_folder(name: str, path: Path | None, config: str) -> Path:
    if path is None or not (path / config).is_file():
        raise InputError(f"no weights for the encoder {name!r}: {path} does not hold {config}")
    return path


def the_weights(path: Path, preferred: Sequence[str]) -> Path:
    """The one safetensors file in a folder, or the file itself: it is hashed, so it must be certain which is loaded.

    Raises:
        InputError: there is none, there are several, it is damaged, or there are pickles instead.
    """
    if path.is_file():
        refuse_pickle(path)
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is no safetensors file by its name, and weights of other kinds are not read")
        return _checked(path)
    found = sorted(path.glob("*.safetensors"))
    chosen = [path / name for name in preferred if path / name in found] or found
    if not chosen:
        if path.is_dir():
            refuse_pickles_in(path)
        raise InputError(f"{path} holds no weights: put {preferred[0]} there")
    if len(chosen) > 1:
        raise InputError(f"{path} holds several weights files ({', '.join(p.name for p in chosen)}): keep one")
    return _checked(chosen[0])


def _checked(weights: Path) -> Path:
    """The same, if it begins as a safetensors file does: before a network of a billion numbers is built for it."""
    try:
        with safe_open(weights, "np"):
            return weights
    except (OSError, SafetensorError):
        raise InputError(f"{weights} is no safetensors file, or a damaged one; fetch or save it again") from None


def fetched(name: str, known: Published) -> Path:
    """The folder on this machine that holds the published files; fetched from the hub at their pinned commit."""
    weights, *_ = hub_files(
        f"the encoder {name!r}",
        known.repository,
        known.revision,
        known.files,
        f"or copy its {listed(known.files)} into a folder and write '{name}:FOLDER', or use the mini encoders",
        f"the {known.licence}",
    )
    return weights.parent


def readable(name: str, weights: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns; or one sentence instead of a library's screen of mismatched tensors."""
    try:
        return load()
    except Exception as error:
        raise InputError(f"{weights} could not be read as the encoder {name!r}: {said_by(error)}") from error
