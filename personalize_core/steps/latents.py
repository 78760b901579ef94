"""Concept images to latents: what the autoencoder makes of them, in each way that a method prepares them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.files.atomic import is_up_to_date, read_json, write_json
from personalize_core.steps.events import Event, Listener, Report, report_over, unheard
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import asked_for, images_trained_on, load_base, preparations, preprocessing_of
from personalize_core.workspace.stamps.latents import encoded_stamp, latents_stamp
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.images import ConceptLatents
    from personalize_core.concepts.preprocessing import Preprocessing

MOMENTS = "moments.safetensors"  # latents, as the autoencoder's moments
CAPTIONS = "captions.json"  # beside the latents of concept images that have captions
SIZES = "sizes.json"  # beside the latents for a base model that is told of image sizes


def encode_images(store: Store, concept: str, listener: Listener = unheard) -> Report:
    """A concept's images as the autoencoder's moments, in each way that a method of params.yaml prepares them.

    Each way is a folder with a stamp of its own; the report's is of what they have in common.
    """
    started = time.monotonic()
    recipes = preparations(store)
    made = {key: encode_concept(store, concept, recipe, listener) for key, recipe in recipes.items()}
    metrics = {"concept_images": float(len(images_trained_on(store, concept)))}
    return report_over(made, encoded_stamp(store, concept), started, store.latents(concept), metrics)


def encode_concept(store: Store, concept: str, recipe: Preprocessing, listener: Listener) -> Report:
    started = time.monotonic()
    described, folder = store.concept(concept), store.latents(concept, recipe.key)
    paths = images_trained_on(store, concept)
    stamp = latents_stamp(store, concept, recipe)
    with store.alone("latents", concept, recipe.key):
        if is_up_to_date(folder, stamp):
            return Report(stamp, True, time.monotonic() - started, folder)
        with making(store, folder, stamp) as new, store.device():
            base = load_base(store)
            base.tokenizer.check_class_noun(described)
            encode(base, paths, recipe, new, f"encoding {concept}, {recipe.key}", listener)
    return Report(stamp, False, time.monotonic() - started, folder)


def encode(
    base: BaseModel, paths: Sequence[Path], recipe: Preprocessing, folder: Path, what: str, listener: Listener
) -> None:
    """Write the moments of all images in one file; the tensor "000" holds the first image's views.

    For a base model that is told of them, also the sizes of each view: for each image rows of `TextContext.sizes`.
    """
    import torch

    from personalize_core.concepts.image_files import load_image
    from personalize_core.concepts.images import sized_views_of, to_pixels
    from personalize_core.files.atomic import save_tensors

    moments, sizes = {}, []
    for index, path in enumerate(paths):
        views = sized_views_of(recipe, load_image(path), base.image_size)
        moments[f"{index:03d}"] = base.moments(to_pixels([view.shown for view in views]))
        sizes.append([view.sizes for view in views])
        listener(Event(what, index + 1, len(paths)))
    if not all(torch.isfinite(tensor).all() for tensor in moments.values()):
        raise FloatingPointError(f"{what}: the autoencoder gave numbers that are not finite")
    save_tensors(folder / MOMENTS, moments)
    if base.is_told_sizes:
        write_json(folder / SIZES, sizes)


def images_encoded(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / MOMENTS, "numpy") as opened:
        return len(opened.keys())


def read_latents(store: Store, concept: str, method: str, class_images: Path | None) -> ConceptLatents:
    """What the method sees; class_images: the folder of their moments, where it asks for them."""
    import torch
    from safetensors.torch import load_file

    from personalize_core.concepts.images import ConceptLatents

    def read(folder: Path) -> list:
        saved = load_file(folder / MOMENTS)
        return [saved[name] for name in sorted(saved, key=int)]

    def read_sizes(folder: Path) -> list | None:
        if not (folder / SIZES).is_file():
            return None
        return [torch.tensor(of_views, dtype=torch.float32) for of_views in read_json(folder / SIZES)]

    folder = store.latents(concept, preprocessing_of(store, method).key)
    own, sizes = read(folder), read_sizes(folder)
    if class_images is None:
        return ConceptLatents(own, sizes=sizes)
    of_class, captions = read(class_images), []
    if (class_images / CAPTIONS).is_file():
        captions = read_json(class_images / CAPTIONS)
    else:
        of_class = of_class[: asked_for(store, method)]
    return ConceptLatents(own, of_class, captions, sizes, read_sizes(class_images))
