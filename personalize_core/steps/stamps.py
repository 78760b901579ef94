"""The data version of every result: all that it depends on, by content, and the sources of our own among it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from personalize_core import intake
from personalize_core.errors import InputError
from personalize_core.files import MANIFEST, Stamp, read_json, sha256, sources_hash, stamp_of
from personalize_core.methods import method_class, method_file
from personalize_core.models import identify
from personalize_core.steps.recipes import preprocessing_of
from personalize_core.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from personalize_core.data import Preprocessing

# Whose source a step's result depends on, besides the method's own file. Not proof.py: it can refuse an artifact, but
# not change it.
ENCODING = ("data", "models")
DRAWING = ("attention", "base", "data", "localized", "method", "parts", "sample", "text")
REFINING = ("context_regularization", "randomness")  # on top, for test-time optimization
TRAINING = (
    "attention",
    "base",
    "context_regularization",
    "data",
    "localized",
    "method",
    "parts",
    "prompts",
    "text",
    "train",
    "training_prompts",  # a folder of lists, for all methods: which of them a method reads, its recipe decides
)
SCORING = ("metrics/features", "metrics/masks", "metrics/scoring", "metrics/similarity", "metrics/tables")
NAMING = ("names", "methods/names.yaml")  # what people read instead of identifiers
COMPARING = (
    "comparison",
    "coverage",
    "figures",
    "metrics/costs",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/tables",
    *NAMING,
)
# And all of report/, its page among it.
REPORTING = ("comparison", "coverage", "figures", "metrics/ranking", "metrics/tables", *NAMING)


def train_stamp(store: Store, concept: str, method: str) -> Stamp:
    """Names everything that an artifact depends on: of the latents, only what this method sees."""
    if store.repeat:
        return repeat_stamp(train_stamp(store.again(0), concept, method), store.training_seed)
    params, described = store.params, store.concept(concept)
    kind, config, recipe = method_class(method), params.config(method), preprocessing_of(store, method)
    class_images = ""
    if kind.real_class_images(config):
        class_images = real_class_images_stamp(store, described.class_noun, recipe.of_class_images)
    elif wanted := kind.class_images(config):
        _, class_images = class_images_stamps(store, described.class_noun, recipe.of_class_images, wanted)
    return stamp_of(
        {
            "method": method,
            "concept": vars(described),
            "latents": latents_stamp(store, concept, recipe),
            "class_images": class_images,
            "config": repr(config),
            "base_model": identify(params.base_model).weights_hash,
            "precision": params.precision,
            "gradient_checkpointing": params.gradient_checkpointing,
            "seed": params.seed,
            "sources": sources_hash([*TRAINING, f"methods/{method_file(method)}"]),
        }
    )


def repeat_stamp(original: str, seed: int) -> Stamp:
    """Of what differs from an artifact in its training's seed alone."""
    return stamp_of({"again": original, "seed": seed})


def latents_stamp(store: Store, concept: str, recipe: Preprocessing) -> Stamp:
    """Names everything that the moments of a concept's photographs depend on, prepared in one way."""
    files = intake.content(store.concept_folder(concept))
    return stamp_of({"files": files, **_encoding(store, recipe)})


def pictures_stamp(store: Store, class_noun: str) -> Stamp:
    """Names everything that pictures of a class noun depend on; not how many there are."""
    params = store.params
    return stamp_of(
        {
            "base_model": identify(params.base_model).weights_hash,
            "class_noun": class_noun,
            "drawing": params.class_images.model_dump(),
            "precision": params.precision,
            "seed": params.seed,
            "sources": sources_hash(DRAWING),
        }
    )


def class_images_stamps(store: Store, class_noun: str, recipe: Preprocessing, wanted: int) -> tuple[str, str]:
    """Of the moments of these pictures, prepared in one way, and of the first `wanted` of them."""
    encoded = stamp_of({"pictures": pictures_stamp(store, class_noun), **_encoding(store, recipe)})
    return encoded, stamp_of({"encoded": encoded, "images": wanted})


def real_class_images_stamp(store: Store, class_noun: str, recipe: Preprocessing) -> str:
    captioned = intake.captioned(store.regularization(class_noun))
    files = {path.name: [sha256(path), caption] for path, caption in captioned}
    return stamp_of({"files": files, **_encoding(store, recipe)})


def _encoding(store: Store, recipe: Preprocessing) -> dict[str, Any]:
    """What moments depend on besides the pictures."""
    about = identify(store.params.base_model)
    return {
        "preprocessing": recipe.key,
        "vae": about.hash_of("vae"),
        "image_size": about.hash_of("unet_config"),
        "sources": sources_hash(ENCODING),
    }


def artifact_stamp(store: Store, concept: str, method: str) -> str:
    """Of the method's artifact, if it is one of this base model."""
    stamp = manifest_stamp(store.artifact(method, concept), f"{method} has not been trained on {concept!r}")
    check_artifact(store, concept, method)
    return stamp


def check_artifact(store: Store, concept: str, method: str) -> None:
    from personalize_core import artifact

    about = identify(store.params.base_model)
    artifact.check(store.artifact(method, concept), method, about.name, about.weights_hash)


def manifest_stamp(folder: Path, what_is_missing: str) -> str:
    try:
        return read_json(folder / MANIFEST)["stamp"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{what_is_missing}; `personalize run` makes whatever is missing") from None
