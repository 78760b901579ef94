"""What latents and class images depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from personalize_core.concepts import concept_files
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import Stamp, sha256, sources_hash, stamp_of
from personalize_core.workspace.recipes import content_trained_on
from personalize_core.workspace.stamps.common import base_model, computed_by
from personalize_core.workspace.stamps.sources import ENCODING, SAMPLING
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.concepts.preprocessing import Preprocessing


@memoized
def latents_stamp(store: Store, concept: str, recipe: Preprocessing) -> Stamp:
    """Names everything that the moments of a concept's images depend on, prepared in one way."""
    return stamp_of({"files": content_trained_on(store, concept), **encoded_by(store, recipe)})


def encoded_stamp(store: Store, concept: str) -> Stamp:
    """What the moments of a concept have in common, however its concept images are prepared: that, its method's recipe
    says. So another method that prepares them in another way changes nothing for those that there are."""
    return stamp_of({"files": content_trained_on(store, concept), **encoded_by(store, None)})


def class_encoded_stamp(store: Store, class_noun: str) -> Stamp:
    """The same of the images of a class noun, however many are wanted."""
    return stamp_of({"sampled": images_stamp(store, class_noun), **encoded_by(store, None)})


@memoized
def images_stamp(store: Store, class_noun: str) -> Stamp:
    """Names everything that images of a class noun depend on; not how many there are."""
    params = store.params
    return stamp_of(
        {
            "base_model": base_model(store).weights_hash,
            "class_noun": class_noun,
            "sampling": params.class_images.model_dump(),
            "precision": params.precision,
            "seed": params.seed,
            "sources": sources_hash(SAMPLING),
            **computed_by(store),
        }
    )


@memoized
def class_images_stamps(store: Store, class_noun: str, recipe: Preprocessing, wanted: int) -> tuple[Stamp, Stamp]:
    """Of the moments of these images, prepared in one way, and of the first `wanted` of them."""
    encoded = stamp_of({"sampled": images_stamp(store, class_noun), **encoded_by(store, recipe)})
    return encoded, stamp_of({"encoded": encoded, "images": wanted})


@memoized
def real_class_images_stamp(store: Store, class_noun: str, recipe: Preprocessing) -> Stamp:
    captioned = concept_files.captioned(store.regularization(class_noun))
    files = {path.name: [sha256(path), caption] for path, caption in captioned}
    return stamp_of({"files": files, **encoded_by(store, recipe)})


@memoized
def encoded_by(store: Store, recipe: Preprocessing | None) -> dict[str, Any]:
    """What moments depend on besides the images."""
    about = base_model(store)
    return {
        **({"preprocessing": recipe.key} if recipe else {}),
        "vae": about.hash_of("vae"),
        "image_size": store.params.image_size or about.hash_of("unet_config"),
        "sources": sources_hash(ENCODING),
    }
