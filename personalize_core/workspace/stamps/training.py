"""What a trained artifact depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import Stamp, sources_hash, stamp_of
from personalize_core.methods import method_source
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.workspace.lineage.records import manifest_of
from personalize_core.workspace.recipes import preprocessing_of, prompts_of, recipe_of, split_of
from personalize_core.workspace.stamps.common import base_model, computed_by, held_out
from personalize_core.workspace.stamps.latents import (
    class_images_stamps,
    encoded_by,
    latents_stamp,
    real_class_images_stamp,
)
from personalize_core.workspace.stamps.sources import TRAINING, WATCHING
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.concepts.concept import Concept
    from personalize_core.concepts.preprocessing import Preprocessing


@dataclass(frozen=True)
class TrainingInputs:
    """What one training depends on: looked up once, then handed on."""

    concept: Concept
    method: str  # or METHOD@ABLATION
    config: Any  # the method's recipe on this base model
    preprocessing: Preprocessing
    stamp: Stamp


def training_inputs(store: Store, concept: str, method: str) -> TrainingInputs:
    """Raises InputError where the method cannot be trained on the concept as params.yaml says."""
    config, preprocessing = recipe_of(store, method), preprocessing_of(store, method)
    described = concept_for(store, concept, method)
    return TrainingInputs(described, method, config, preprocessing, train_stamp(store, concept, method))


def concept_for(store: Store, concept: str, method: str) -> Concept:
    """The concept as a method learns it: with another class noun, where its recipe asks for the suggested one.

    That is suggested once for a concept, whatever the protocol and the training.

    Raises:
        InputError: none has been suggested, or by other concept images, or by some that no training may read.
    """
    described = store.concept(concept)
    if not store.params.config(method).suggested_class_noun:
        return described
    asks = f"{method} says the noun that `personalize suggest-class {concept}` ranks first"
    if store.params.held_out:
        raise InputError(f"{asks}, and that looks at the images that held_out keeps from training; leave one out")
    folder = store.again(0).without_protocol().analyses("class_nouns", concept)
    try:
        found = read_json(folder / "analyses.json")
        ranked = found["analyses"]["class_nouns"]["metrics"]
        noun = max(ranked, key=lambda each: ranked[each])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{asks}, which has not been run; run it first") from None
    by = manifest_of(folder).get("made_from", {}).get("concept_images")
    if by != concept_files.content(store.concept_folder(concept)):
        raise InputError(f"{asks}, which was run on other concept images than there are now; run it again")
    return replace(described, class_noun=noun)


def train_stamp(store: Store, concept: str, method: str) -> Stamp:
    """Names everything that an artifact depends on: of the latents, only what this method sees."""
    if store.repeat:
        return repeat_stamp(train_stamp(store.again(0), concept, method), store.training_seed)
    described, config = concept_for(store, concept, method), store.params.config(method)
    recipe = preprocessing_of(store, method)
    class_images = ""
    if config.real_class_images:
        class_images = real_class_images_stamp(store, described.class_noun, recipe.of_class_images)
    elif wanted := config.class_images_needed:
        _, class_images = class_images_stamps(store, described.class_noun, recipe.of_class_images, wanted)
    return stamp_of(
        {
            **_trained_by(store, method),
            "concept": vars(described),
            "latents": latents_stamp(store, concept, recipe),
            "class_images": class_images,
            **_probed_on(store, concept, method),
        }
    )


def recipe_stamp(store: Store, method: str) -> Stamp:
    """Names what an artifact depends on besides the concept: the same for all concepts of a method."""
    params = store.params
    asks = params.config(method).class_images_needed
    return stamp_of(
        {
            **_trained_by(store, method),
            "class_images": params.class_images.model_dump() if asks else {},
            "encoding": encoded_by(store, preprocessing_of(store, method)),  # it has sources of its own
            **held_out(store),
        }
    )


def repeat_stamp(original: str, seed: int) -> Stamp:
    """Of what differs from an artifact in its training's seed alone."""
    return stamp_of({"again": original, "seed": seed})


@memoized
def _trained_by(store: Store, method: str) -> dict[str, Any]:
    """What an artifact depends on, whatever it is of."""
    params = store.params
    return {
        "method": method,
        "config": repr(params.config(method)),
        "base_model": base_model(store).weights_hash,
        "precision": params.precision,
        "gradient_checkpointing": params.gradient_checkpointing,
        "seed": params.seed,
        "sources": sources_hash([*TRAINING, method_source(method)]),
        **({"optimizer": params.optimizer} if params.optimizer != "adamw" else {}),
        **computed_by(store),
        **({"files": files} if (files := params.config(method).files) else {}),
        **_ended_by(store, method),
    }


def _ended_by(store: Store, method: str) -> dict[str, Any]:
    """What decides how long a method is trained, whatever of, besides its recipe; nothing where that alone does."""
    adaptive, params = store.params.config(method).adaptive, store.without_protocol().params
    if not adaptive:
        return {}
    probes: dict[str, Any] = {}
    if adaptive.needs_probes:
        encoders = [params.encoders.identity[0], params.encoders.text_image[0]]
        probes = {
            "probes": params.probes.model_dump(exclude={"share"}),
            "probe_sampler": params.sampling.model_dump(include={"sampler", "guidance", "eta"}),
            "encoders": [weights_of(name) for name in encoders],
        }
    return {"watching": sources_hash(WATCHING), **probes}


def _probed_on(store: Store, concept: str, method: str) -> dict[str, Any]:
    """What the probes of a concept show and are compared with, where they decide anything."""
    adaptive, plain = store.params.config(method).adaptive, store.without_protocol()
    if not adaptive or not adaptive.needs_probes:
        return {}
    files, held_out = concept_files.content(store.concept_folder(concept)), split_of(store, concept).held_out
    return {
        "probed": prompts_of(plain, concept).templates[: plain.params.probes.prompts],
        "probed_against": {name: files[name] for name in held_out},
    }
