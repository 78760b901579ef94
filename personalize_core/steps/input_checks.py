"""A look at every input before a run, so that a mistake ends it before any training. All mistakes are found at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.artifacts.description import imported
from personalize_core.base_model.loading import identify
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, together
from personalize_core.files.atomic import is_up_to_date
from personalize_core.files.snapshot import memoized, snapshot
from personalize_core.metrics import encoder_names
from personalize_core.metrics.judge import local_weights
from personalize_core.metrics.judge.keys import key_of
from personalize_core.steps.external import listing_of
from personalize_core.steps.probe_conditions import check_held_out
from personalize_core.steps.training import untrained
from personalize_core.workspace.external_columns import registered
from personalize_core.workspace.recipes import (
    base_for_a_moment,
    check_concepts_wanted,
    check_prompts,
    concepts_wanted,
    prompts_of,
    recipe_of,
    split_of,
)
from personalize_core.workspace.stamps.made import check_artifact
from personalize_core.workspace.stamps.sampling import sampling_inputs
from personalize_core.workspace.stamps.scoring import is_scored_as_now
from personalize_core.workspace.stamps.training import concept_for, train_stamp, training_inputs
from personalize_core.workspace.store import Store
from personalize_core.workspace.variants import Variant

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel


class Problems:
    """The errors that checks end with, in their order."""

    def __init__(self) -> None:
        self.errors: list[InputError] = []

    def free_of(self, check: Callable[..., Any], *args: Any) -> bool:
        """Run a check, keep its error; returns whether it had none."""
        try:
            check(*args)
        except InputError as error:
            self.errors.append(error)
            return False
        return True


def check_inputs(store: Store, concepts: Sequence[str], methods: Sequence[str]) -> None:
    """Raise InputError with everything that would stop a run later: reads every file, and trains and samples nothing.

    What only the base model can tell is asked of it, once, if there is anything to train or to sample: whether its
    tokenizer can place each class noun, whether each method can be made for it, and whether it can read each prompt.
    """
    if problems := problems_of(store, concepts, methods):
        raise together(problems)


@snapshot()
def problems_of(store: Store, concepts: Sequence[str], methods: Sequence[str]) -> list[InputError]:
    """What `check_inputs` raises, one by one; none if all is well."""
    found = Problems()
    sound = [concept for concept in concepts if found.free_of(_check_concept, store, concept)]
    if not found.free_of(lambda: store.params):
        return found.errors  # it says which methods there are, and on which base model
    for method in store.params.variants:
        if method not in methods:  # a misspelt option is refused whatever is run
            found.free_of(store.params.check_spelling, method)
    usable = [method for method in methods if found.free_of(_check_method, store, method)]
    base_is_there = found.free_of(identify, store.params.base_model)
    found.free_of(check_prompts, store)
    _check_encoders(store, found)
    cells = [
        (concept, method)
        for concept in sound
        if found.free_of(prompts_of, store, concept)
        for method in usable
        if found.free_of(_check_cell, store, concept, method)
    ]
    found.free_of(_check_judge, store, cells)
    if base_is_there:
        _check_on_base(store, cells, found)
    return found.errors


def problems_of_workspace(
    store: Store, concepts: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[InputError]:
    """As `problems_of`, of everything there is: also of protocols, of folders of concepts that no run asks for, and of
    external columns.

    By default all concepts of the workspace (or of the protocol), and the methods and ablations that params.yaml lists.
    """
    found = Problems()
    if concepts is None:
        wanted = found.free_of(check_concepts_wanted, store)
        concepts = concepts_wanted(store) if wanted else store.concept_names()
        for folder in sorted(path for path in store.concepts.glob("[!.]*") if path.is_dir()):
            if folder.name not in concepts:
                found.free_of(concept_files.read_concept, folder)
    for protocol in store.protocol_names():
        found.free_of(lambda name=protocol: replace(store, protocol=name).described_protocol)
    for label, concept in registered(store):
        found.free_of(listing_of, store, label, concept)
    if methods is None:
        methods = store.params.method_names if found.free_of(lambda: store.params) else []
    return [*found.errors, *problems_of(store, concepts, methods)]


def check_concept_images(
    store: Store, concept: str, concept_images: int, method: str, variants: Mapping[str, Variant]
) -> None:
    """Raise InputError where one of the method's variants takes more concept images than are trained on."""
    config = store.params.config(method)
    held_out = " that are not held out" if store.params.held_out else ""
    for name, variant in variants.items():
        needed = config.images_needed(variant.sampling)
        if needed > concept_images:
            raise InputError(
                f"params.yaml, variants.{method}.{name}: it takes {needed} concept images, and {concept!r} "
                f"has {concept_images}{held_out}; change these options, or leave this concept out"
            )


def _check_concept(store: Store, concept: str) -> None:
    store.concept(concept)
    _images_of(store, concept)


@memoized
def _images_of(store: Store, concept: str) -> list[Path]:
    return concept_files.concept_images(store.concept_folder(concept))


def _check_method(store: Store, method: str) -> None:
    store.params.check_method(method)
    recipe_of(store, method)
    store.params.own_variants(method)


def _check_encoders(store: Store, found: Problems) -> None:
    encoders = store.params.encoders
    for name in encoders.text_image:
        found.free_of(encoder_names.find, name, "text_image")
    for name in encoders.identity:
        found.free_of(encoder_names.find, name, "identity")
    if encoders.segmenter:
        found.free_of(encoder_names.find, encoders.segmenter, "segmenter")
    if encoders.masc:
        found.free_of(encoder_names.find, encoders.masc, "masc")


def _check_judge(store: Store, cells: Sequence[tuple[str, str]]) -> None:
    """Raise InputError if a judge is to be asked about one of these (concept, method), and cannot be."""
    judge = store.params.judge
    if not judge or all(is_scored_as_now(store, *cell) for cell in cells):
        return
    if judge.local:
        local_weights.weights_of(judge.local.model, judge.local.revision)
    else:
        key_of(judge.key_variable)


def _check_cell(store: Store, concept: str, method: str) -> None:
    concept_for(store, concept, method)
    if store.params.config(method).real_class_images:
        concept_files.captioned(store.regularization(store.concept(concept).class_noun))
    if imported(store.artifact(method, concept)):
        check_artifact(store, concept, method)
    else:
        check_held_out(store, concept, method)
    trained_on = len(split_of(store, concept).trained_on)
    check_concept_images(store, concept, trained_on, method, store.params.own_variants(method))


def _check_on_base(store: Store, cells: Sequence[tuple[str, str]], found: Problems) -> None:
    """Find out whether each (concept, method) can be trained and sampled on this base model.

    A method is made once for each class noun: what else a concept has, a name and a placeholder, is as good as another.
    """
    to_train = {cell for cell in cells if not _is_trained(store, *cell)}
    cells = [cell for cell in cells if cell in to_train or not _is_sampled(store, *cell)]
    if not cells:
        return
    with ExitStack() as at_base:
        try:
            base = at_base.enter_context(base_for_a_moment(store))
        except InputError as error:
            found.errors.append(error)
            return
        nouns = {concept: store.concept(concept) for concept, _ in cells}
        placed = {name: found.free_of(base.tokenizer.check_class_noun, concept) for name, concept in nouns.items()}
        made: set[tuple[str, str, str]] = set()
        refused: set[tuple[str, int]] = set()  # prompts, by list and place, so that each is refused once
        seeing: set[str] = set()  # methods whose sight has been checked, which reads gigabytes
        for concept, method in cells:
            case = (method, nouns[concept].class_noun, prompts_of(store, concept).name)
            if placed[concept] and case not in made:
                made.add(case)
                _check_learner(store, base, concept, method, (concept, method) in to_train, refused, seeing, found)


def _check_learner(
    store: Store,
    base: BaseModel,
    concept: str,
    method: str,
    to_train: bool,
    refused: set[tuple[str, int]],
    seeing: set[str],
    found: Problems,
) -> None:
    """Make the method for the base model, and let its tokenizer read each prompt as the method says it."""
    from personalize_core.methods.interface import SeesImages
    from personalize_core.steps.probing import check_share

    try:
        learner = untrained(store, inputs := training_inputs(store, concept, method), base)
        if to_train:
            if isinstance(learner, SeesImages) and method not in seeing:
                seeing.add(method)
                learner.check_sight(base)
            check_share(store, inputs, learner, base)
    except InputError as error:
        if to_train:
            found.errors.append(InputError(f"{method} cannot be trained on {concept!r}: {error}"))
        return
    prompts = prompts_of(store, concept)
    for number, template in enumerate(prompts.templates, start=1):
        if (prompts.name, number) not in refused:
            try:
                base.tokenizer([learner.say(template)], learner.concept)
            except InputError as error:
                refused.add((prompts.name, number))
                found.errors.append(InputError(f"prompt {number} of the list {prompts.name!r}: {error}"))


def _is_trained(store: Store, concept: str, method: str) -> bool:
    """Would training leave this artifact as it is?"""
    folder = store.artifact(method, concept)
    return imported(folder) is not None or is_up_to_date(folder, train_stamp(store, concept, method))


def _is_sampled(store: Store, concept: str, method: str) -> bool:
    """Would sampling leave this grid as it is, or be refused for what another check has found?"""
    try:
        return is_up_to_date(store.grid(method, concept), sampling_inputs(store, concept, method).stamp)
    except InputError:
        return True
