"""Images to features: what a table is measured with, and images as the encoders see them, whole and masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize_core.concepts.image_files import load_image
from personalize_core.concepts.masks import own_masks
from personalize_core.errors import InputError
from personalize_core.metrics import masks
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.metrics.encoders import (
    Encoder,
    TextImageEncoder,
    load_identity_encoder,
    load_text_image_encoder,
)
from personalize_core.metrics.preprocessing import in_threads
from personalize_core.metrics.tables import EMPTY

CHUNK = 256  # images that are held in memory at once


@dataclass(frozen=True)
class Encoders:
    """What a table is measured with; of each list the first is the headline."""

    text_image: Sequence[TextImageEncoder]  # CLIP-T and CLIP-I
    identity: Sequence[Encoder]  # DINO
    segmenter: masks.Segmenter | None = None  # masked CLIP-I and DINO; None: not measured
    texts: Sequence[str] = ("class_phrase", "slot_deleted")  # CLIP-T; of tables.TEXTS

    @property
    def of_images(self) -> list[tuple[str, Encoder, bool]]:
        """(metric without masks, encoder, is it the headline) of all that compare images with images."""
        lists = (("clip_i", self.text_image), ("dino", self.identity))
        return [(metric, one, number == 0) for metric, some in lists for number, one in enumerate(some)]


def load_encoders(
    text_image: Sequence[str],
    identity: Sequence[str],
    segmenter: str | None,
    texts: Sequence[str],
    device: str,
) -> Encoders:
    """What a table is measured with, kept for the next table, which mostly wants the same.

    Raises:
        InputError: one of them cannot be had, or two of a list go by one name.
    """
    weights = tuple(weights_of(name) for name in [*text_image, *identity, *([segmenter] if segmenter else [])])
    made = _loaded(tuple(text_image), tuple(identity), segmenter, tuple(texts), device, weights)
    for given, encoders in ((text_image, made.text_image), (identity, made.identity)):
        names = [encoder.name for encoder in encoders]
        if twice := [name for name in names if names.count(name) > 1]:
            places = [place for place, name in zip(given, names, strict=True) if name == twice[0]]
            raise InputError(
                f"{' and '.join(places)} both go by the name {twice[0]!r}, and scores are told apart by it; rename a "
                "folder, or leave one out"
            )
    return made


@lru_cache(maxsize=1)
def _loaded(
    text_image: tuple[str, ...],
    identity: tuple[str, ...],
    segmenter: str | None,
    texts: tuple[str, ...],
    device: str,
    weights: tuple[str, ...],
) -> Encoders:
    """weights: others by now are loaded anew, though their names are the same."""
    return Encoders(
        [load_text_image_encoder(name, device) for name in text_image],
        [load_identity_encoder(name, device) for name in identity],
        masks.load_segmenter(segmenter, device) if segmenter else None,
        texts,
    )


@dataclass(frozen=True)
class Seen:
    """Images as the encoders see them, whole and masked, each image read once and prepared once per encoder."""

    features: Mapping[tuple[str, str, bool], Tensor]  # (metric without masks, encoder's name, masked) -> (N, D)
    foreground: Sequence[float] | None  # (N) share of each image that its mask leaves; None: no segmenter
    unmasked_for: str = ""  # why there are no masked features

    @classmethod
    def of(cls, paths: Sequence[Path], class_noun: str, own: Sequence[masks.Mask] | None, encoders: Encoders) -> Seen:
        """own: masks that came with the images; None: the segmenter finds them."""
        parts: dict[tuple[str, str, bool], list[Tensor]] = {}
        shares: list[float] = []
        for start, images in _chunks(paths):
            found = own[start : start + len(images)] if own else None
            views = {False: images}
            if encoders.segmenter:
                found = found or encoders.segmenter.masks(images, class_noun)
                shares += map(masks.share, found)
                views[True] = [masks.composite(*pair) for pair in zip(images, found, strict=True)]
            for masked, view in views.items():
                for metric, encoder, _ in encoders.of_images:
                    parts.setdefault((metric, encoder.name, masked), []).append(encoder.images(view))
        joined = {key: torch.cat(some) for key, some in parts.items()}
        return cls(joined, shares if encoders.segmenter else None)

    @classmethod
    def of_concept_images(cls, paths: Sequence[Path], class_noun: str, encoders: Encoders) -> Seen:
        """The same of a concept's images. If no concept is found in one of them, there are no masked features.

        A concept image that is grey all over would reward the images that do not show the concept.
        """
        own = own_masks(paths) if encoders.segmenter else None
        seen = cls.of(paths, class_noun, own, encoders)
        empty = [path for path, share in zip(paths, seen.foreground or [], strict=False) if share < EMPTY]
        if not empty:
            return seen
        by = "the mask that came with it" if own or not encoders.segmenter else encoders.segmenter.name
        why = f"in the concept image {empty[0].name} {by} finds no {class_noun}; put better masks beside the images"
        return cls({key: some for key, some in seen.features.items() if not key[2]}, seen.foreground, why)


def _chunks(paths: Sequence[Path]) -> Iterator[tuple[int, list[Any]]]:
    for start in range(0, len(paths), CHUNK):
        yield start, list(in_threads(load_image, paths[start : start + CHUNK]))
