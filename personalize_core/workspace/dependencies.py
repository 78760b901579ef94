"""The data version of every result: all that it depends on, by content, and the sources of our own among it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from personalize_core.artifacts.description import check as check_description
from personalize_core.base_model.loading import Identity, identify
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import MANIFEST, changed_files, is_up_to_date, read_json
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import Stamp, sha256, sources_hash, stamp_of
from personalize_core.methods import method_source
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.metrics.judge import local_weights
from personalize_core.sampling.grid import read_grid
from personalize_core.workspace.lineage.records import manifest_of
from personalize_core.workspace.recipes import (
    content_trained_on,
    preprocessing_of,
    prompts_of,
    recipe_of,
    split_of,
    variants_of,
)
from personalize_core.workspace.store import REFERENCES, Store, is_label

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from personalize_core.concepts.concept import Concept
    from personalize_core.concepts.preprocessing import Preprocessing
    from personalize_core.workspace.protocols import Prompts
    from personalize_core.workspace.variants import Variant

# Whose source a step's result depends on, besides the method's own file. Not proof.py: it can refuse an artifact, but
# not change it.
ENCODING = (
    "concepts/image_files",
    "concepts/images",
    "concepts/preprocessing",
    "base_model/loading",
    "base_model/parts",
    "base_model/pretrained",
)
SHARED = (  # what several methods are made of
    "methods/shared/concept_embedding",
    "methods/shared/embedding_and_unet",
    "methods/shared/lag",
    "methods/shared/layer_modules",
    "methods/shared/low_rank",
    "methods/shared/merged_weights",
    "methods/shared/one_embedding",
    "methods/shared/training_batches",
    "methods/shared/tuned_weights",
)
SAMPLING = (
    "base_model/attention",
    "base_model/blocks",
    "base_model/compiling",
    "base_model/hooks",
    "base_model/layers",
    "base_model/kept_prompts",
    "base_model/model",
    "base_model/prompt_variants",
    "base_model/text",
    "base_model/text_encoders",
    "base_model/transfer",
    "concepts/images",
    "methods/interface",
    *SHARED,
    "sampling/frozen",
    "sampling/sampler",
)
# On top, for test-time optimization.
REFINING = ("methods/shared/context_regularizer", "sampling/test_time_optimization", "randomness")
# On top, for guidance with the base model's weights beside the learned ones.
GUIDING = ("sampling/weight_guidance",)
TRAINING = (
    "base_model/attention",
    "base_model/blocks",
    "base_model/compiling",
    "base_model/hooks",
    "base_model/layers",
    "base_model/kept_prompts",
    "base_model/model",
    "base_model/prompt_variants",
    "base_model/text",
    "base_model/text_encoders",
    "base_model/transfer",
    "concepts/images",
    "concepts/prompt_lists",
    "methods/interface",
    "methods/shared/context_regularizer",
    *SHARED,
    "methods/training_prompts",  # a folder of lists, for all methods: which of them a method reads, its recipe decides
    "training/checkpoints",
    "training/loop",
    "training/micro_batches",
    "training/optimizers",
    "training/readings",
)
# On top, where a training ends when enough is learned.
WATCHING = (
    "concepts/held_out",
    "metrics/balance",
    "metrics/encoders",
    "metrics/faces",
    "metrics/preprocessing",
    "metrics/similarity",
    "metrics/weights",
    "sampling/frozen",
    "sampling/sampler",
    "sampling/some_images",
    "steps/probing",
    "training/fixed_inputs",
    "training/stopping",
    "training/watch",
)
ENCODERS = ("metrics/encoder_names", "metrics/encoders", "metrics/faces", "metrics/preprocessing", "metrics/weights")
SCORING = (
    *ENCODERS,
    "metrics/chunks",
    "metrics/features",
    "metrics/masc",
    "metrics/masks",
    "metrics/parquet",
    "metrics/references",
    "metrics/scoring",
    "metrics/similarity",
    "metrics/tables",
    "sampling/grid",
)
JUDGING = ("metrics/judge",)  # on top, where a judge is asked
EXTERNAL = ("external", "sampling/grid", "workspace/external_columns")
# What people read instead of identifiers; the methods' own display names are stamped by their values.
NAMING = ("report/display_names", "methods/shared/options")
COMPARING = (
    "metrics/concept_coverage",
    "metrics/costs",
    "metrics/held_out",
    "metrics/pairing",
    "metrics/parquet",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/summaries",
    "metrics/tables",
    "report/comparison",
    "report/figures",
    *NAMING,
)
# And all of report/, its page among it.
REPORTING = (
    "metrics/balance",
    "metrics/concept_coverage",
    "metrics/ended_early",
    "metrics/held_out",
    "metrics/pairing",
    "metrics/parquet",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/summaries",
    "metrics/tables",
    "report/figures",
    *NAMING,
)


@dataclass(frozen=True)
class TrainingInputs:
    """What one training depends on: looked up once, then handed on."""

    concept: Concept
    method: str  # or METHOD@ABLATION
    config: Any  # the method's recipe on this base model
    preprocessing: Preprocessing
    stamp: Stamp


@dataclass(frozen=True)
class SamplingInputs:
    """What one image grid depends on: looked up once, then handed on."""

    prompts: Prompts
    variants: Mapping[str, Variant]
    artifact: str  # its stamp
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


def sampling_inputs(store: Store, concept: str, method: str) -> SamplingInputs:
    """What the method's images of the concept depend on.

    Raises:
        InputError: the method has not been trained on the concept, or not on this base model.
    """
    prompts, variants = prompts_of(store, concept), variants_of(store, method)
    artifact = artifact_stamp(store, concept, method)
    stamp = stamp_of(
        {
            "artifact": artifact,
            "templates": prompts.templates,
            **sampled_by(store, method),
            "sources": sampling_sources(method),
            **refined_by(store, concept, method, variants),
        }
    )
    return SamplingInputs(prompts, variants, artifact, stamp)


def score_stamp(store: Store, concept: str, method: str) -> Stamp:
    """Names everything that a table of scores depends on; method may be REFERENCES.

    Raises:
        InputError: there is no grid of the method.
    """
    from personalize_core.concepts.masks import own_content

    sampled: dict[str, Any] = {}
    if method != REFERENCES:
        missing = f"{method} has sampled no grid of {concept!r}"
        if is_label(method):
            missing = f"the images of the external column {method!r} of {concept!r} have not been listed"
        sampled["grid"] = manifest_stamp(store.grid(method, concept), missing)
        sampled["without_identity"] = without_identity(store, concept, method)
    folder = store.concept_folder(concept)
    return stamp_of(
        {
            **sampled,
            **scored_by(store),
            "concept": vars(store.concept(concept)),
            "concept_images": concept_files.content(folder),
            "masks": own_content(folder) if store.params.encoders.segmenter else {},
            **({"held_out": list(split_of(store, concept).held_out)} if store.params.held_out else {}),
        }
    )


def without_identity(store: Store, concept: str, method: str) -> list[int]:
    """Places of prompts in the grid's list whose images have no identity scores, as the protocol has it.

    An external column has a list of its own, in which they are found by their text.
    """
    prompts = prompts_of(store, concept)
    if not is_label(method):
        return sorted(prompts.without_identity)
    skipped = {prompts.templates[place] for place in prompts.without_identity}
    templates = read_grid(store.grid(method, concept))["templates"]
    return [place for place, template in enumerate(templates) if template in skipped]


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


def external_stamp(store: Store, concept: str, label: str, listed: Mapping[str, Any]) -> Stamp:
    """Names everything that the list of an external column's images depends on.

    listed: what the list holds, with the sha256 of every image.
    """
    return stamp_of({"listed": listed, "concept": vars(store.concept(concept)), "sources": sources_hash(EXTERNAL)})


def base_model_name(store: Store) -> str:
    return _base_model(store).name


def recipe_stamp(store: Store, method: str) -> Stamp:
    """Names what an artifact depends on besides the concept: the same for all concepts of a method."""
    params = store.params
    asks = params.config(method).class_images_needed
    return stamp_of(
        {
            **_trained_by(store, method),
            "class_images": params.class_images.model_dump() if asks else {},
            "encoding": _encoding(store, preprocessing_of(store, method)),  # it has sources of its own
            **_held_out(store),
        }
    )


def sampling_stamp(store: Store, method: str) -> Stamp:
    """Names what the images of a method depend on besides its artifact: the same for all concepts."""
    lists = sorted(store.prompts(each.name) for each in store.params.sampling.prompts)
    refined, guided = refinements(variants_of(store, method)), guidances(variants_of(store, method))
    return stamp_of(
        {
            **sampled_by(store, method),
            "lists": [each.model_dump(exclude={"without_identity"}) for each in store.params.sampling.prompts],
            "prompts": {path.name: sha256(path) for path in lists if path.is_file()},
            "refinement": refined,
            **({"guidance": guided} if guided else {}),
            "sources": sampling_sources(method, *(REFINING if refined else ()), *(GUIDING if guided else ())),
        }
    )


def scoring_stamp(store: Store) -> Stamp:
    """Names what scores depend on besides sampled and concept images."""
    unread = [each.without_identity for each in store.params.sampling.prompts]
    return stamp_of({**scored_by(store), "without_identity": unread, **_held_out(store)})


def _held_out(store: Store) -> dict[str, Any]:
    """Nothing where no image is held out, so that what was made before there was such a setting keeps its stamp."""
    return {"held_out": store.params.held_out} if store.params.held_out else {}


@memoized
def _trained_by(store: Store, method: str) -> dict[str, Any]:
    """What an artifact depends on, whatever it is of."""
    params = store.params
    return {
        "method": method,
        "config": repr(params.config(method)),
        "base_model": _base_model(store).weights_hash,
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


@memoized
def sampled_by(store: Store, method: str) -> dict[str, Any]:
    """What a method's images depend on, besides artifact, prompts and sources, whatever they are of."""
    params = store.params
    return {
        "sampling": params.sampling.how(),
        "variants": {name: repr(variant.sampling) for name, variant in variants_of(store, method).items()},
        "precision": params.precision,
        "seed": store.sampling_seed,
        **computed_by(store),
    }


def computed_by(store: Store) -> dict[str, Any]:
    """Compiled code rounds otherwise, and images may have a size that is not the base model's own. Nothing without
    either, so that what was made before there were such settings keeps its stamp."""
    params = store.params
    sized = {"image_size": params.image_size} if params.image_size else {}
    return {"compile": True, **sized} if params.compile else sized


@memoized
def sampling_sources(method: str, *more: str) -> Stamp:
    return sources_hash([*SAMPLING, method_source(method), *more])


def refinements(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Variant -> its test-time optimization, of those that ask for it."""
    return {name: repr(variant.refinement) for name, variant in variants.items() if variant.refinement}


def guidances(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Variant -> its guidance with the base model's weights, of those that ask for it."""
    return {name: repr(variant.guidance) for name, variant in variants.items() if variant.guidance}


def refined_by(store: Store, concept: str, method: str, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """What images depend on besides, where a variant asks for a strategy beside the method's own options."""
    found: dict[str, Any] = {}
    if refined := refinements(variants):
        latents = latents_stamp(store, concept, preprocessing_of(store, method))
        found |= {"refinement": refined, "latents": latents, "refining_sources": sources_hash(REFINING)}
    if guided := guidances(variants):
        found |= {"guidance": guided, "guiding_sources": sources_hash(GUIDING)}
    return found


@memoized
def scored_by(store: Store) -> dict[str, Any]:
    """What every table of scores depends on, whatever it is of."""
    names = store.params.encoders
    by_name = [*names.text_image, *names.identity, *filter(None, [names.segmenter, names.masc])]
    return {
        "encoders": [weights_of(name) for name in by_name],
        "lists": names.model_dump(),
        "sources": sources_hash(SCORING),
        **_judged_by(store),
    }


def is_scored_as_now(store: Store, concept: str, method: str) -> bool:
    """Would scoring leave this table as it is? method: or the label of an external column."""
    try:
        return is_up_to_date(store.scores(method, concept), score_stamp(store, concept, method))
    except InputError:  # nothing has been sampled
        return False


def _judged_by(store: Store) -> dict[str, Any]:
    """Nothing where no judge is asked, so that tables without one keep their stamp."""
    if not (judge := store.params.judge):
        return {}
    weights = local_weights.weights_of(judge.local.model, judge.local.revision) if judge.local else ""
    return {"judge": {**judge.scored_by, "weights": weights, "sources": sources_hash(JUDGING)}}


def repeat_stamp(original: str, seed: int) -> Stamp:
    """Of what differs from an artifact in its training's seed alone."""
    return stamp_of({"again": original, "seed": seed})


@memoized
def latents_stamp(store: Store, concept: str, recipe: Preprocessing) -> Stamp:
    """Names everything that the moments of a concept's images depend on, prepared in one way."""
    return stamp_of({"files": content_trained_on(store, concept), **_encoding(store, recipe)})


def encoded_stamp(store: Store, concept: str) -> Stamp:
    """What the moments of a concept have in common, however its concept images are prepared: that, its method's recipe
    says. So another method that prepares them in another way changes nothing for those that there are."""
    return stamp_of({"files": content_trained_on(store, concept), **_encoding(store, None)})


def class_encoded_stamp(store: Store, class_noun: str) -> Stamp:
    """The same of the images of a class noun, however many are wanted."""
    return stamp_of({"sampled": images_stamp(store, class_noun), **_encoding(store, None)})


@memoized
def images_stamp(store: Store, class_noun: str) -> Stamp:
    """Names everything that images of a class noun depend on; not how many there are."""
    params = store.params
    return stamp_of(
        {
            "base_model": _base_model(store).weights_hash,
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
    encoded = stamp_of({"sampled": images_stamp(store, class_noun), **_encoding(store, recipe)})
    return encoded, stamp_of({"encoded": encoded, "images": wanted})


@memoized
def real_class_images_stamp(store: Store, class_noun: str, recipe: Preprocessing) -> Stamp:
    captioned = concept_files.captioned(store.regularization(class_noun))
    files = {path.name: [sha256(path), caption] for path, caption in captioned}
    return stamp_of({"files": files, **_encoding(store, recipe)})


@memoized
def _base_model(store: Store) -> Identity:
    return identify(store.params.base_model)


@memoized
def _encoding(store: Store, recipe: Preprocessing | None) -> dict[str, Any]:
    """What moments depend on besides the images."""
    about = _base_model(store)
    return {
        **({"preprocessing": recipe.key} if recipe else {}),
        "vae": about.hash_of("vae"),
        "image_size": store.params.image_size or about.hash_of("unet_config"),
        "sources": sources_hash(ENCODING),
    }


def artifact_stamp(store: Store, concept: str, method: str) -> str:
    """Of the method's artifact, if it is one of this base model.

    Raises:
        InputError: there is no such concept, no such artifact, or it is damaged or of another base model.
    """
    folder = store.artifact(method, concept)
    if not folder.exists():
        store.concept(concept)  # so that a misspelt name is said to be one
    stamp = manifest_stamp(folder, f"{method} has not been trained on {concept!r}")
    check_artifact(store, concept, method)
    return stamp


def check_artifact(store: Store, concept: str, method: str) -> None:
    """Raise InputError unless the folder holds an artifact of this method and base model."""
    about = _base_model(store)
    check_description(store.artifact(method, concept), method, about.name, about.weights_hash)


def manifest_stamp(folder: Path, what_is_missing: str, again: str = "`personalize run` makes it again") -> str:
    """The stamp of a result that is there, whole and unchanged.

    Raises:
        InputError: it is not there, its manifest is damaged, or one of its files has been changed or removed since.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        stamp, changed = manifest["stamp"], changed_files(folder, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{what_is_missing}; {again}") from None
    if changed:
        raise InputError(f"{folder}: {listed(changed)} changed since this was made, or is gone; {again}")
    return stamp
