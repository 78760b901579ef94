"""What params.yaml says to a step: which base model, which recipe, how concept images are prepared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil

from personalize_core.base_model.compiler import check_compiler
from personalize_core.base_model.determinism import set_deterministic
from personalize_core.base_model.loading import choose_device, load_base_model
from personalize_core.concepts import concept_files
from personalize_core.concepts.held_out import Split, split
from personalize_core.errors import InputError, listed
from personalize_core.files.snapshot import memoized
from personalize_core.training.optimizers import check_optimizer
from personalize_core.workspace.protocols import Prompts, read_collection, read_prompts
from personalize_core.workspace.sampling_settings import PromptList
from personalize_core.workspace.store import OWN_DEVICE, Store
from personalize_core.workspace.variants import Variant

if TYPE_CHECKING:
    from pathlib import Path

    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.preprocessing import Preprocessing

A_PROCESS = 2 * 2**30  # bytes, at most, that training, sampling and scoring beside the miniature take

MOST_WORKERS = 8  # each holds the images of a chunk in memory


def load_base(store: Store) -> BaseModel:
    set_deterministic(store.params.deterministic)
    base = load_base_model(store.params.base_model, device_of(store), store.params.precision, store.params.image_size)
    base.compiles = store.params.compile
    return base


@contextmanager
def base_for_a_moment(store: Store) -> Iterator[BaseModel]:
    """The base model, for what is soon done and computes next to nothing.

    On a graphics card while no other process uses it, for it may not hold two base models; in a CPU's memory beside
    whoever is at work.
    """
    with nullcontext() if device_of(store) == "cpu" else store.device():
        yield load_base(store)


def device_of(store: Store) -> str:
    """Where a step computes. Beside the miniature all of them compute on one thread.

    Its networks and encoders are so small that a second thread costs more than it gives; and sums then come out the
    same on every machine, whichever step is the first of its process.
    """
    import torch

    if store.params.base_model == "mini":
        torch.set_num_threads(1)
    return choose_device(store.params.device)


def processes_of(store: Store, asked: int | None = None) -> int:
    """How many processes this machine can compute in at once: one that has the device to itself, or, where each takes
    one thread of a CPU, one for each core, as far as memory allows.

    Args:
        asked: how many somebody wants; that many, if it can be.

    Raises:
        InputError: more than one are asked for, and all would compute on one graphics card.
    """
    if asked:
        if asked > 1 and device_of(store) != "cpu":
            raise InputError(
                f"--processes {asked} would compute on one graphics card in {asked} processes at once, each with a "
                "base model of its own; leave it out. With several cards start one command for each, with other "
                "concepts and its own CUDA_VISIBLE_DEVICES"
            )
        return asked
    if store.params.base_model != "mini" or device_of(store) != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // A_PROCESS))


def workers_of(store: Store) -> int:
    """How many threads of this process read, prepare and encode images at once: one where it has been given one core.

    On a device of its own one thread's images are prepared while another's are encoded.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares_cores = device_of(store) == "cpu" and os.environ.get(OWN_DEVICE) == "1"
    return 1 if shares_cores else min(MOST_WORKERS, cores)


@memoized
def recipe_of(store: Store, method: str) -> Any:
    """The method's Config, where it can be trained as params.yaml says."""
    check_optimizer(store.params.optimizer)
    if store.params.compile:
        check_compiler(choose_device(store.params.device))
    return store.params.config(method)


@memoized
def prompts_of(store: Store, concept: str) -> Prompts:
    """What is sampled of a concept, by the protocol or by params.yaml.

    Raises:
        InputError: there is no such list, or the protocol's collection has none for this concept.
    """
    described, protocol = store.concept(concept), store.described_protocol
    if protocol and protocol.collection:
        lists = read_collection(store.prompt_collection(protocol.collection), store.protocol or "")
        if concept not in lists:
            raise InputError(
                f"protocol {store.protocol!r} has no prompts for {concept!r}; leave it out, or give a concept one of "
                f"its names: {listed(sorted(lists))}"
            )
        return read_prompts(lists[concept], PromptList(name=f"{protocol.collection}/{lists[concept].stem}"))
    chosen = store.params.sampling.prompts_for(described)
    return read_prompts(store.prompts(chosen.name), chosen)


def check_prompts(store: Store) -> None:
    """Raise InputError unless every list that the protocol or params.yaml names is there and whole."""
    protocol = store.described_protocol
    if protocol and protocol.collection:
        read_collection(store.prompt_collection(protocol.collection), store.protocol or "")
    for each in store.params.sampling.prompts:
        read_prompts(store.prompts(each.name), each)


def concepts_wanted(store: Store) -> list[str]:
    """The concepts of the protocol; all of the workspace where it names none, or there is no protocol."""
    protocol = store.described_protocol
    if protocol and protocol.collection:
        return sorted(read_collection(store.prompt_collection(protocol.collection), store.protocol or ""))
    return list(protocol.concepts) if protocol and protocol.concepts else store.concept_names()


def check_concepts_wanted(store: Store) -> None:
    """Raise InputError unless the workspace has all of them, and any at all."""
    wanted, known = concepts_wanted(store), store.concept_names()
    lacking = [name for name in wanted if name not in known]
    if not wanted:
        raise InputError(f"there are no concepts in {store.concepts}; add one with `personalize add`")
    if lacking:
        raise InputError(
            f"protocol {store.protocol!r} is about {len(wanted)} concepts, and {store.concepts} lacks "
            f"{listed(lacking[:5])}{f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''}; add each with "
            "`personalize add FOLDER --class-noun NOUN --name NAME`, or name the concepts to sample"
        )


@memoized
def split_of(store: Store, concept: str) -> Split:
    """Which of the concept's images are trained on, and which are held out, by params.yaml.

    Raises:
        InputError: an image that would be held out has the same bytes as one that would be trained on.
    """
    files = dict(concept_files.content(store.concept_folder(concept)))
    files.pop(concept_files.DESCRIPTION)
    try:
        return split(files, store.params.held_out)
    except InputError as error:
        raise InputError(f"{store.concept_folder(concept)}: {error}") from None


def images_trained_on(store: Store, concept: str) -> list[Path]:
    """The concept images that training may read, sorted, every one decoded once. No other place chooses them.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    folder = store.concept_folder(concept)
    if not store.params.held_out:
        return concept_files.concept_images(folder)
    return concept_files.concept_images(folder, split_of(store, concept).trained_on)


def content_trained_on(store: Store, concept: str) -> dict[str, str]:
    """File name -> sha256, of the description and of the concept images that training reads."""
    content = concept_files.content(store.concept_folder(concept))
    if not store.params.held_out:
        return content
    held_out = split_of(store, concept).held_out
    return {name: digest for name, digest in content.items() if name not in held_out}


@memoized
def preprocessing_of(store: Store, method: str) -> Preprocessing:
    return store.params.config(method).preprocessing


def methods_with_a_recipe(store: Store) -> list[str]:
    """The methods of params.yaml whose section there is right. What is wrong with another, its own cells say."""

    def is_right(method: str) -> bool:
        try:
            store.params.config(method)
        except InputError:
            return False
        return True

    return [name for name in store.params.method_names if is_right(name)]


def preparations(store: Store) -> dict[str, Preprocessing]:
    """Each way in which a method of params.yaml has concept images prepared.

    By its key: the name of the folder of latents.
    """
    return {recipe.key: recipe for recipe in (preprocessing_of(store, name) for name in methods_with_a_recipe(store))}


def class_preparations(store: Store) -> dict[str, Preprocessing]:
    """The same of class images by the base model."""
    recipes = (preprocessing_of(store, name).of_class_images for name in asking_for_class_images(store))
    return {recipe.key: recipe for recipe in recipes}


@memoized
def variants_of(store: Store, method: str) -> dict[str, Variant]:
    """As `Params.sampling_variants`, which looks at the options of every method each time."""
    return store.params.sampling_variants(method)


def class_images_wanted(store: Store) -> int:
    """The most class images that any method of params.yaml asks the base model for; 0 if none does."""
    return max((asked_for(store, name) for name in asking_for_class_images(store)), default=0)


def asking_for_class_images(store: Store) -> list[str]:
    """The methods of params.yaml that want images of the class noun by the base model."""
    return [name for name in methods_with_a_recipe(store) if asks_for_class_images(store, name)]


def asks_for_class_images(store: Store, method: str) -> bool:
    recipe = store.params.config(method)
    return bool(recipe.class_images_needed) and not recipe.real_class_images


def asked_for(store: Store, method: str) -> int:
    return store.params.config(method).class_images_needed
