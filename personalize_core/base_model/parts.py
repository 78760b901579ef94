"""The parts of a Stable Diffusion in a folder of diffusers' layout: which there are, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from personalize_core.base_model.pretrained import CONFIG, check_settings, load_network, weights_in
from personalize_core.errors import InputError, listed, said_by, shown
from personalize_core.files.outside import MOST_RESULT, is_there, read_json_object, refuse_pickles_in

PARTS = ("text_encoder", "vae", "unet")
SECOND_ENCODER, SECOND_TOKENIZER = "text_encoder_2", "tokenizer_2"  # of Stable Diffusion XL
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_STEMS = {  # of the files of weights
    "text_encoder": "model",
    SECOND_ENCODER: "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
_TOKENIZER = ("tokenizer.json", "vocab.json")  # of these one
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OF_ANOTHER = "take all parts from one base model"
_TOLD = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")  # what a U-Net may be told beside the text


@dataclass(frozen=True)
class Layout:
    """Where the parts lie.

    Args:
        root: the folder.
        other_vae: the folder of an autoencoder that takes the place of its own.
    """

    root: Path
    other_vae: Path | None = None

    def of(self, part: str) -> Path:
        return self.other_vae if part == "vae" and self.other_vae else self.root / part

    @cached_property
    def index(self) -> dict[str, Any]:
        """What model_index.json says; nothing where there is none.

        Raises:
            InputError: it is damaged.
        """
        path = self.root / INDEX
        found = read_json_object(path) if is_there(path) else {}
        for part in {*PARTS, SECOND_ENCODER, "tokenizer", SECOND_TOKENIZER, "scheduler"} & found.keys():
            if not isinstance(found[part], list):
                raise InputError(f"{path}: {part} is {shown(found[part])}, and should be a list: library and class")
        return found

    @cached_property
    def is_xl(self) -> bool:
        """Is it a Stable Diffusion XL? It is if it has a second text encoder, and its U-Net is told of sizes.

        Raises:
            InputError: a file is missing, or one part is XL's and another is not.
        """
        told = is_there(self.root / "unet" / CONFIG) and _is_told_sizes(self.root / "unet" / CONFIG)
        named = any(self.index.get(SECOND_ENCODER, []))  # [null, null] where there is none
        there = (self.root / SECOND_ENCODER).is_dir()
        mixed = f"{self.root} is put together from different base models: "
        as_xl = f"is told of pooled text and of image sizes (unet/{CONFIG}), as in Stable Diffusion XL"
        if told and not named and not there:
            raise InputError(f"{mixed}its U-Net {as_xl}, and it has no {SECOND_ENCODER}; {_OF_ANOTHER}")
        is_xl = told or named or there
        self._check_complete(is_xl)
        if is_xl and not told:
            raise InputError(
                f"{mixed}it has a second text encoder, as Stable Diffusion XL, and its U-Net is told of text alone "
                f"(unet/{CONFIG}), as in Stable Diffusion 1 and 2; {_OF_ANOTHER}"
            )
        if is_xl and not named:
            raise InputError(
                f"{mixed}it has a second text encoder, as Stable Diffusion XL, and {INDEX} names none; {_OF_ANOTHER}"
            )
        return is_xl

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks."""
        return (*PARTS, SECOND_ENCODER) if self.is_xl else PARTS

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return ("tokenizer", SECOND_TOKENIZER) if self.is_xl else ("tokenizer",)

    @property
    def empty_prompt_is_zero(self) -> bool:
        """Of a Stable Diffusion XL: see `BaseModel`.

        Raises:
            InputError: model_index.json says neither yes nor no.
        """
        said = self.index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(said, bool):
            raise InputError(
                f"{self.root / INDEX}: force_zeros_for_empty_prompt is {shown(said)}, and should be true or false"
            )
        return said

    def check_weights(self) -> None:
        """Raise InputError unless each network's files of weights are there and are such."""
        for part in self.parts:
            weights_in(self.of(part), _STEMS[part])

    def check_pickles(self) -> None:
        """Raise InputError if a network's weights are there as a pickle alone."""
        for part in self.parts:
            if not list(self.of(part).glob("*.safetensors")):
                refuse_pickles_in(self.of(part))

    def _check_complete(self, is_xl: bool) -> None:
        parts = (*PARTS, SECOND_ENCODER) if is_xl else PARTS
        needed = {SCHEDULER: self.root / SCHEDULER, **{f"{part}/{CONFIG}": self.of(part) / CONFIG for part in parts}}
        if is_xl:
            needed[INDEX] = self.root / INDEX
        missing = [name for name, path in needed.items() if not path.is_file()]
        for each in ("tokenizer", SECOND_TOKENIZER) if is_xl else ("tokenizer",):
            if not any((self.root / each / file).is_file() for file in _TOKENIZER):
                missing.append(f"{each}/{_TOKENIZER[0]}")
        if missing:
            raise InputError(f"{self.root} is no Stable Diffusion in diffusers' layout: it has no {listed(missing)}")


def network_files(part: str) -> list[str]:
    """Patterns of the files of a network, in its folder on the hub: without variants in half precision."""
    stem = _STEMS[part]
    return [CONFIG, f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"]


FILES = (  # patterns of all files that are read of a repository
    INDEX,
    SCHEDULER,
    *(f"{part}/{file}" for part in _STEMS for file in network_files(part)),
    *(f"{each}/{file}" for each in ("tokenizer", SECOND_TOKENIZER) for file in (*_TOKENIZER, *_BESIDE)),
)


def check_vae(folder: Path) -> None:
    """Raise InputError unless it holds an autoencoder's files."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no {CONFIG} of an autoencoder")
    weights_in(folder, _STEMS["vae"])


def load_parts(layout: Layout) -> dict[str, Any]:
    """The components by the names of `BaseModel`'s arguments: networks in float32, every weight as its file has it.

    Raises:
        InputError: a file is missing or damaged, or two parts do not fit together; the sentence says which.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        SECOND_ENCODER: CLIPTextModelWithProjection,
    }
    loaded: dict[str, Any] = {"scheduler": _scheduler(layout.root / SCHEDULER)}
    loaded |= {part: load_network(kinds[part], layout.of(part)) for part in layout.parts}
    encoders = ("text_encoder", SECOND_ENCODER)[: len(layout.tokenizers)]
    for part, encoder in zip(layout.tokenizers, encoders, strict=True):
        loaded[part] = _tokenizer(layout.root / part, loaded[encoder].config)
    _check_fit(layout, {part: loaded[part].config for part in layout.parts})
    if layout.is_xl:
        loaded["empty_prompt_is_zero"] = layout.empty_prompt_is_zero
    return loaded


def _is_told_sizes(path: Path) -> bool:
    """Is the U-Net of this configuration told of pooled text and sizes, as Stable Diffusion XL's?

    Raises:
        InputError: it is told of something else.
    """
    config = read_json_object(path)
    told = config.get("addition_embed_type")
    others = {name: value for name in _TOLD if (value := config.get(name)) is not None}
    if told not in (None, "text_time"):
        others["addition_embed_type"] = told
    for name, value in others.items():
        raise InputError(
            f"{path}: {name} is {shown(value)}, so the U-Net is told of something beside the text that Stable "
            "Diffusion 1, 2 and XL are not told of; take one of these"
        )
    return told is not None


def _scheduler(path: Path) -> Any:
    from diffusers import DDPMScheduler

    check_settings(DDPMScheduler, path)
    try:
        scheduler: Any = DDPMScheduler.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # ValueError, NotImplementedError, TypeError, by the setting
        raise _undescribed(path, "noise schedule", error) from error
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{path}: prediction_type is {scheduler.config.prediction_type!r}, and base models are loaded here that "
            "predict the noise ('epsilon') or the velocity ('v_prediction')"
        )
    return scheduler


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """encoder: the configuration of the text encoder that reads its tokens."""
    from transformers import CLIPTokenizer

    for path in sorted(folder.glob("*.json")):
        read_json_object(path, MOST_RESULT)
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        vocabulary, length = tokenizer.get_vocab(), tokenizer.model_max_length
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        tokenizer("a photo")
    except Exception as error:  # KeyError, ValueError, and what the tokenizers library raises
        raise _undescribed(folder, "tokenizer", error) from error
    longest = encoder.max_position_embeddings
    if not isinstance(length, int) or not 2 < length <= longest:
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {shown(length)}, and its text encoder reads at "
            f"most {longest} tokens; fetch or save it again"
        )
    if lacking := [f"{name}_token" for name, number in special.items() if not isinstance(number, int)]:
        raise InputError(f"{folder} has a tokenizer without {listed(lacking)}; fetch or save it again")
    if max(vocabulary.values()) >= encoder.vocab_size:
        raise InputError(
            f"{folder} has {max(vocabulary.values()) + 1:,} tokens, and its text encoder knows {encoder.vocab_size:,}; "
            f"{_OF_ANOTHER}"
        )
    return tokenizer


def _check_fit(layout: Layout, configs: Mapping[str, Any]) -> None:
    """Raise InputError unless the U-Net reads what the text encoders and the autoencoder make."""
    unet, mixed = configs["unet"], f"{layout.root} is put together from different base models: "
    widths = [configs[part].hidden_size for part in ("text_encoder", SECOND_ENCODER) if part in configs]
    read = unet.cross_attention_dim
    if {*read} != {sum(widths)} if isinstance(read, list | tuple) else read != sum(widths):
        said = f"encoders are {' and '.join(map(str, widths))}" if len(widths) > 1 else f"encoder is {widths[0]}"
        raise InputError(f"{mixed}its text {said} wide, and its U-Net reads text that is {read} wide; {_OF_ANOTHER}")
    if layout.is_xl:
        pooled, told = configs[SECOND_ENCODER].projection_dim, unet.projection_class_embeddings_input_dim
        sizes = 6 * (unet.addition_time_embed_dim or 0)  # of `TextContext.sizes`
        if told != pooled + sizes:
            raise InputError(
                f"{mixed}its second text encoder's projection ({pooled} wide) and six sizes ({sizes}) are not what its "
                f"U-Net is told of ({told}); {_OF_ANOTHER}"
            )
    channels, latent = (unet.in_channels, unet.out_channels), configs["vae"].latent_channels
    if channels != (latent, latent):
        raise InputError(
            f"{layout.root} has a U-Net that reads {channels[0]} channels and makes {channels[1]}, and an autoencoder "
            f"of {latent}; take a base model that makes images from text alone, and {_OF_ANOTHER}"
        )


def _undescribed(path: Path, what: str, error: Exception) -> InputError:
    return InputError(f"{path} describes no {what} that can be read ({said_by(error)}); fetch or save it again")
