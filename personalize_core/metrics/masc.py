"""MaSC: likeness and prompt following from one pass of SigLIP 2, told apart by masks.

Bartkowiak et al. 2026 (arXiv 2605.22469): concept preservation matches the patches of the concept in a concept image
with all patches of the image; prompt following compares the image's other patches, pooled, with the prompt without its
subject. What they do not say, or where this differs, docs/encoders.md says (MaSC).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.concepts.image_files import load_image
from personalize_core.concepts.masks import Mask
from personalize_core.files.stamps import sha256
from personalize_core.metrics import masks
from personalize_core.metrics.encoder_names import find
from personalize_core.metrics.encoders import check_width, network_of, of_transformers
from personalize_core.metrics.preprocessing import in_threads
from personalize_core.metrics.weights import MASC, existing_folder, fetched, readable, the_weights

MOST_PATCHES = 1024  # of an image; the authors' setting
HALF = 0.5  # a patch shows the concept if more than this share of it does, and the background if less does
BATCH_SIZE = 8  # images at once: each is up to MOST_PATCHES rows


@dataclass(frozen=True)
class Patches:
    """One image as the network sees it."""

    tokens: Tensor  # (N, D) float32 on the CPU, after the final norm
    foreground: Tensor  # (N) bool: the patch shows the concept
    background: Tensor | None  # (D) those that show the background, pooled; None: there are none
    share: float  # of the image that its mask leaves, in [0, 1]


@dataclass(frozen=True)
class NaFlex:
    """SigLIP 2 at an image's own shape (Tschannen et al. 2025), a Siglip2Model of transformers."""

    name: str
    weights_hash: str
    processor: Any
    model: Any
    tokenizer: Any
    device: str

    @property
    def preprocessing(self) -> str:
        own = self.processor
        return (
            f"RGB; about its own shape in at most {MOST_PATCHES} patches of {own.patch_size}, bilinear, by Pillow; "
            f"values in [0, 1]; mean {list(own.image_mean)}; std {list(own.image_std)}; texts in lower case, padded to "
            f"{self.context_length} tokens"
        )

    @property
    def context_length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image], shown: Sequence[Mask]) -> list[Patches]:
        """Each image's patches.

        Args:
            shown: (h, w) bool for each image: where it shows the concept.
        """
        given = self.processor(
            [image.convert("RGB") for image in images], max_num_patches=MOST_PATCHES, return_tensors="pt"
        )
        given = {key: value.to(self.device) for key, value in given.items()}
        tower = self.model.vision_model
        tokens = tower(**given).last_hidden_state
        made = []
        for row, (mask, shape) in enumerate(zip(shown, given["spatial_shapes"].tolist(), strict=True)):
            own = tokens[row, : shape[0] * shape[1]]
            shares = on_patches(mask, shape)
            rest = own[(shares < HALF).to(own.device)]
            # left out of the attention pooling, which is the same as masked from it
            pooled = tower.head(rest[None])[0].float().cpu() if len(rest) else None
            made.append(Patches(own.float().cpu(), shares > HALF, pooled, masks.share(mask)))
        return made

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU. Read in lower case, as the network was trained (SigLIP 2, sec. 2.1)."""
        lower = [words.lower() for words in texts]
        options = {"padding": "max_length", "max_length": self.context_length, "truncation": True}
        tokens = self.tokenizer(lower, return_tensors="pt", **options)["input_ids"].to(self.device)
        return self.model.text_model(input_ids=tokens).pooler_output.float().cpu()


def on_patches(mask: Mask, shape: Sequence[int]) -> Tensor:
    """(h, w) bool of an image to (N) shares of its patches in [0, 1], N = shape[0] * shape[1], row by row."""
    shares = F.interpolate(
        torch.from_numpy(mask.astype("float32"))[None, None], size=tuple(shape), mode="bilinear", align_corners=False
    )
    return shares.flatten()


def concept_preservation(reference: Patches, image: Patches) -> float:
    """Mean over the reference's foreground patches of the best cosine with any patch of the image; in [-1, 1].

    Raises:
        ValueError: the reference has no foreground patch.
    """
    shown = reference.tokens[reference.foreground]
    if not len(shown):
        raise ValueError("no patch of the reference shows the concept")
    cosines = F.normalize(shown.double(), dim=1) @ F.normalize(image.tokens.double(), dim=1).T
    return float(cosines.max(dim=1).values.mean().clamp(-1, 1))


def without_subject(prompt: str, class_noun: str) -> str:
    """The prompt without its subject: with its article wherever it has one, else alone; as the authors' package does.

    >>> without_subject("A photo of a kitten in a garden", "kitten")
    'A photo of in a garden'
    """
    noun = re.escape(class_noun.strip())
    for pattern in (rf"\b(?:a|an|the)\s+{noun}\b", rf"\b{noun}\b"):
        prompt, found = re.subn(pattern, "", prompt, flags=re.IGNORECASE)
        if found:
            break
    return re.sub(r"\s+", " ", prompt).strip()


def look(
    network: NaFlex, paths: Sequence[Path], class_noun: str, own: Sequence[Mask] | None, segmenter: masks.Segmenter
) -> Iterator[Patches]:
    """Each image's patches in turn, a few images in memory at once.

    Args:
        own: masks that came with the images; None: the segmenter finds them.
    """
    for start in range(0, len(paths), BATCH_SIZE):
        images = list(in_threads(load_image, paths[start : start + BATCH_SIZE]))
        shown = own[start : start + BATCH_SIZE] if own else segmenter.masks(images, class_noun)
        yield from network.images(images, shown)


def rule(segmenter: masks.Segmenter) -> str:
    """The mask rule, in words, for every score."""
    return (
        f"patches of which more than {HALF:g} shows the concept, or less, for the background; concept images by masks "
        "that came with them, if any, else, as sampled images, by "
        f"{segmenter.name} ({segmenter.weights_hash}: {segmenter.preprocessing})"
    )


def load_masc(name_or_folder: str, device: str = "cpu") -> NaFlex:
    """What MaSC is measured with.

    Args:
        name_or_folder: "siglip2-so400m-naflex", fetched from the hub, the authors' choice; that name and ":PATH", the
            same from a local folder; or a folder with a Siglip2Model that transformers wrote.

    Raises:
        InputError: no such name, weights that cannot be had, or a folder that holds something else.
    """
    name, path = find(name_or_folder, "masc")
    from transformers import AutoTokenizer, Siglip2Model
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    from personalize_core.compat import hide_bars_of_transformers

    hide_bars_of_transformers()
    known = MASC.get(name)
    folder = existing_folder(name, path or fetched(name, MASC[name]), "config.json")
    network_of(folder, {"siglip2": "Siglip2Model"})
    weights = the_weights(folder, ("model.safetensors",))
    model = of_transformers(name, Siglip2Model, folder, weights)
    check_width(name, folder, model.config.vision_config.hidden_size, known)

    def read(make: Callable[[], Any]) -> Any:
        return readable(name, folder, make)

    about = read(lambda: json.loads((folder / "preprocessor_config.json").read_text()))
    processor = read(lambda: Siglip2ImageProcessorPil.from_dict(about))
    tokenizer = read(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return NaFlex(name, sha256(weights), processor, model.to(device), tokenizer, device)
