"""Images to features: what a table is measured with, and images as the encoders see them, whole and masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from personalize_core.concepts.image_files import load_image
from personalize_core.concepts.masks import own_masks
from personalize_core.errors import InputError
from personalize_core.files.stamps import sha256_or_none, sources_hash
from personalize_core.metrics import masks
from personalize_core.metrics.chunks import even_chunks, in_workers
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.metrics.encoders import (
    Encoder,
    TextImageEncoder,
    load_identity_encoder,
    load_text_image_encoder,
)
from personalize_core.metrics.kept_features import Chunk, KeptFeatures
from personalize_core.metrics.masc import NaFlex, load_masc
from personalize_core.metrics.tables import EMPTY

SOURCES = (  # of our own, what features depend on
    "concepts/image_files",
    "metrics/chunks",
    "metrics/encoders",
    "metrics/faces",
    "metrics/features",
    "metrics/masks",
    "metrics/preprocessing",
    "metrics/weights",
)


@dataclass(frozen=True)
class Encoders:
    """What a table is measured with; of each list the first is the headline."""

    text_image: Sequence[TextImageEncoder]  # CLIP-T and CLIP-I
    identity: Sequence[Encoder]  # DINO
    segmenter: masks.Segmenter | None = None  # masked CLIP-I and DINO; None: not measured
    texts: Sequence[str] = ("class_phrase", "slot_deleted")  # CLIP-T; of tables.TEXTS
    masc: NaFlex | None = None  # MaSC, by the segmenter's masks; None: not measured

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
    masc: str | None = None,
) -> Encoders:
    """What a table is measured with, kept for the next table, which mostly wants the same.

    Raises:
        InputError: one of them cannot be had, or two of a list go by one name.
    """
    weights = tuple(weights_of(name) for name in [*text_image, *identity, *filter(None, [segmenter, masc])])
    made = _loaded(tuple(text_image), tuple(identity), segmenter, tuple(texts), device, masc, weights)
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
    masc: str | None,
    weights: tuple[str, ...],
) -> Encoders:
    """weights: others by now are loaded anew, though their names are the same."""
    return Encoders(
        [load_text_image_encoder(name, device) for name in text_image],
        [load_identity_encoder(name, device) for name in identity],
        masks.load_segmenter(segmenter, device) if segmenter else None,
        texts,
        load_masc(masc, device) if masc else None,
    )


@dataclass(frozen=True)
class Processing:
    """How images are worked through; no score depends on it."""

    workers: int = 1  # threads that read, prepare and encode, each a chunk of its own
    device: str = "cpu"  # of the encoders
    kept: KeptFeatures | None = None  # where the features of finished chunks are kept; None: nowhere
    progress: Callable[[int, int], None] = lambda done, total: None  # images that are encoded, of how many


@dataclass(frozen=True)
class Seen:
    """Images as the encoders see them, whole and masked, each image read once and prepared once per encoder."""

    features: Mapping[tuple[str, str, bool], Tensor]  # (metric without masks, encoder's name, masked) -> (N, D)
    foreground: Sequence[float] | None  # (N) share of each image that its mask leaves; None: no segmenter
    unmasked_for: str = ""  # why there are no masked features
    left_out: Sequence[tuple[int, str]] = ()  # (place among the given images, reason); N counts the others alone
    paths: Sequence[Path] = ()  # (N) their files

    @classmethod
    def of(
        cls,
        paths: Sequence[Path],
        class_noun: str,
        own: Sequence[masks.Mask] | None,
        encoders: Encoders,
        processing: Processing | None = None,
        unreadable: Literal["raise", "leave_out"] = "raise",
    ) -> Seen:
        """The features of images in files, in the files' order.

        Args:
            own: masks that came with the images; None: the segmenter finds them.
            unreadable: what becomes of an image that cannot be read as `load_image` reads it. "leave_out": it has no
                features, and `left_out` says why.

        Raises:
            InputError: an image cannot be read, or, with "leave_out", none of them can.
        """
        how = processing or Processing()
        chunks, done = even_chunks(len(paths)), 0
        kept = how.kept if own is None else None
        shared = _dependencies(class_noun, encoders, how.device) if kept else {}

        def encoded(places: range) -> Chunk:
            some = [paths[place] for place in places]
            depends_on = {"images": [sha256_or_none(path) for path in some], **shared} if kept else {}
            before = kept.read(depends_on) if kept else None
            if before and not (before.left_out and unreadable == "raise"):
                return before
            found = _encoded(some, class_noun, own and [own[place] for place in places], encoders, unreadable)
            if kept:
                kept.write(depends_on, found)
            return found

        views = (False, True) if encoders.segmenter else (False,)
        kinds = [(masked, metric, encoder) for masked in views for metric, encoder, _ in encoders.of_images]
        joined: dict[tuple[str, str, bool], Tensor] = {}
        shares: list[float] = []
        left_out: list[tuple[int, str]] = []
        rows = 0
        how.progress(0, len(paths))
        for places, part in zip(chunks, in_workers(encoded, chunks, how.workers), strict=True):
            left_out += [(places[place], reason) for place, reason in part.left_out]
            shares += part.shares
            read = len(places) - len(part.left_out)
            for masked, metric, encoder in kinds if read else ():
                key, some = (metric, encoder.name, masked), part.features[_in_file(metric, encoder, masked)]
                if key not in joined:  # at once for all: small tensors that stay would scatter the memory of large ones
                    joined[key] = some.new_empty(len(paths), some.shape[1])
                joined[key][rows : rows + read] = some
            rows += read
            done += len(places)
            how.progress(done, len(paths))
        if not rows:
            reason = f"; of {paths[0].name}: it {left_out[0][1]}" if left_out else ""
            raise InputError(f"none of {len(paths)} images can be read{reason}")
        features = {key: some[:rows] for key, some in joined.items()}
        unread = dict(left_out)
        read = [path for place, path in enumerate(paths) if place not in unread]
        return cls(features, shares if encoders.segmenter else None, left_out=left_out, paths=read)

    @classmethod
    def of_concept_images(
        cls, paths: Sequence[Path], class_noun: str, encoders: Encoders, processing: Processing | None = None
    ) -> Seen:
        """The same of a concept's images. If no concept is found in one of them, there are no masked features.

        A concept image that is grey all over would reward the images that do not show the concept.
        """
        own = own_masks(paths) if encoders.segmenter else None
        seen = cls.of(paths, class_noun, own, encoders, processing)
        empty = [path for path, share in zip(paths, seen.foreground or [], strict=False) if share < EMPTY]
        if not empty:
            return seen
        by = "the mask that came with it" if own or not encoders.segmenter else encoders.segmenter.name
        why = f"in the concept image {empty[0].name} {by} finds no {class_noun}; put better masks beside the images"
        return replace(
            seen, features={key: some for key, some in seen.features.items() if not key[2]}, unmasked_for=why
        )


def _encoded(
    paths: Sequence[Path],
    class_noun: str,
    own: Sequence[masks.Mask] | None,
    encoders: Encoders,
    unreadable: Literal["raise", "leave_out"],
) -> Chunk:
    """The features of one chunk."""
    images: list[Image.Image] = []
    left_out: list[tuple[int, str]] = []
    for place, path in enumerate(paths):
        try:
            images.append(load_image(path))
        except InputError as error:
            if unreadable == "raise":
                raise
            left_out.append((place, str(error).removeprefix(str(path)).strip()))
    if not images:
        return Chunk({}, [], left_out)
    views, shares = {False: images}, []
    if encoders.segmenter:
        given = own and [mask for place, mask in enumerate(own) if place not in dict(left_out)]
        found = given or encoders.segmenter.masks(images, class_noun)
        shares = [masks.share(mask) for mask in found]
        views[True] = [masks.composite(*pair) for pair in zip(images, found, strict=True)]
    features = {
        _in_file(metric, encoder, masked): encoder.images(view)
        for masked, view in views.items()
        for metric, encoder, _ in encoders.of_images
    }
    return Chunk(features, shares, left_out)


def _in_file(metric: str, encoder: Encoder, masked: bool) -> str:
    return f"{metric} {encoder.name}{' masked' if masked else ''}"


def _dependencies(class_noun: str, encoders: Encoders, device: str) -> dict[str, Any]:
    """What features depend on besides the images: each one's own, and those beside which it is encoded."""
    return {
        "encoders": [[name, one.name, one.weights_hash, one.preprocessing] for name, one, _ in encoders.of_images],
        "masks": [masks.rule(encoders.segmenter), class_noun] if encoders.segmenter else [],
        "device": device,
        "torch": torch.__version__,
        "sources": sources_hash(SOURCES),
    }
