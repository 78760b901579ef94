"""A look at every input before a run, so that a mistake ends it before any training."""

from __future__ import annotations

from collections.abc import Sequence

from personalize_core.base_model.loading import identify
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.files.atomic import is_up_to_date
from personalize_core.methods import check_method
from personalize_core.steps.training import imported, untrained
from personalize_core.workspace.dependencies import check_artifact, train_stamp, training_inputs
from personalize_core.workspace.recipes import check_prompts, load_base, prompts_of, recipe_of, variants_of
from personalize_core.workspace.store import Store


def check_inputs(store: Store, concepts: Sequence[str], methods: Sequence[str]) -> None:
    """Raise InputError for anything that would stop a run later: reads every file, and trains and samples nothing.

    What only the base model can tell is asked of it, once, if there is anything to train: whether its tokenizer can
    place each class noun, and whether each method can be made for it.
    """
    for method in methods:
        check_method(method)
        recipe_of(store, method)
        store.params.sampling_variants(method)
    identify(store.params.base_model)
    check_prompts(store)
    for concept in concepts:
        described = store.concept(concept)
        prompts_of(store, concept)
        concept_images = len(concept_files.concept_images(store.concept_folder(concept)))
        if any(store.params.config(name).real_class_images for name in methods):
            concept_files.captioned(store.regularization(described.class_noun))
        for method in methods:
            if imported(store.artifact(method, concept)):
                check_artifact(store, concept, method)
            check_concept_images(store, concept, concept_images, method)
    cells = [(concept, method) for concept in concepts for method in methods]
    _check_on_base(store, [cell for cell in cells if not _kept(store, *cell)])


def check_concept_images(store: Store, concept: str, concept_images: int, method: str) -> None:
    """Raise InputError where a variant of the method takes more concept images than the concept has."""
    config = store.params.config(method)
    for name, variant in variants_of(store, method).items():
        needed = config.images_needed(variant.sampling)
        if needed > concept_images:
            raise InputError(
                f"params.yaml, variants.{method}.{name}: it takes {needed} concept images, and {concept!r} "
                f"has {concept_images}; change these options, or leave this concept out"
            )


def _kept(store: Store, concept: str, method: str) -> bool:
    """Would training leave this artifact as it is?"""
    folder = store.artifact(method, concept)
    return imported(folder) or is_up_to_date(folder, train_stamp(store, concept, method))


def _check_on_base(store: Store, cells: Sequence[tuple[str, str]]) -> None:
    """Raise InputError unless each (concept, method) can be trained on this base model.

    A method is made once for each class noun: what else a concept has, a name and a placeholder, is as good as another.
    """
    if not cells:
        return
    base, made = load_base(store), set()
    for concept, _ in cells:
        base.tokenizer.check_class_noun(store.concept(concept))
    for concept, method in cells:
        described = store.concept(concept)
        if (method, described.class_noun) not in made:
            made.add((method, described.class_noun))
            try:
                untrained(store, training_inputs(store, concept, method), base)  # and given up at once
            except InputError as error:
                raise InputError(f"{method} cannot be trained on {concept!r}: {error}") from None
