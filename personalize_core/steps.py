"""The steps from photographs to a comparison: files in, files out.

Every step is a pure function of its stamp: what it would make, it finds already made or makes anew, and nobody
ever sees it half made. Dagster, DVC and the command line call these and hold no logic of their own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core import intake
from personalize_core.errors import InputError, listed
from personalize_core.files import (
    MANIFEST,
    is_current,
    read_json,
    sha256,
    sources_hash,
    stamp_of,
    whole_folder,
    write_json,
)
from personalize_core.methods import ABLATION_NAMES, check_method, method_class, method_file
from personalize_core.models import identify, load_base_model
from personalize_core.prompts import read_list
from personalize_core.randomness import seed_for
from personalize_core.store import REFERENCES, Store

if TYPE_CHECKING:
    from personalize_core.analyses.heat_maps import HeatMaps
    from personalize_core.base import BaseModel
    from personalize_core.data import ConceptLatents, Preprocessing
    from personalize_core.method import Method
    from personalize_core.params import Drawing, Params, Variant

SCORES = "scores.parquet"
PROOF = "proof.json"  # beside the weights: a fresh process drew with them what the trainer drew
MOMENTS = "moments.safetensors"  # latents, as the autoencoder's moments
CAPTIONS = "captions.json"  # beside the latents of photographs that have captions
BATCH = 8  # pictures drawn or encoded at once; no picture depends on it

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
SCORING = ("metrics/features", "metrics/scoring", "metrics/similarity", "metrics/tables")
COMPARING = (
    "comparison",
    "figures",
    "metrics/costs",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/tables",
)


@dataclass(frozen=True)
class Event:
    """What a step is doing, for whoever shows progress."""

    what: str  # e.g. "training dreambooth on dog7"
    done: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)  # e.g. this step's loss


Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """The listener of those who do not watch."""


@dataclass(frozen=True)
class Report:
    """What a step did."""

    stamp: str  # names everything the result depends on: the data version
    skipped: bool  # it was there already
    seconds: float
    path: Path  # the folder or table
    numbers: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)  # for people to look at


def encode_images(store: Store, concept: str, listener: Listener = unheard) -> Report:
    """A concept's photographs as the autoencoder's moments, in each way that a method of params.yaml prepares them.

    Each way is a folder with a stamp of its own; the report's is over all of them.
    """
    started = time.monotonic()
    recipes = {recipe.key: recipe for recipe in (_preprocessing(store, name) for name in store.params.method_names)}
    made = {key: _encode_concept(store, concept, recipe, listener) for key, recipe in recipes.items()}
    numbers = {"photographs": float(len(intake.photographs(store.concept_folder(concept))))}
    return _report_over(made, started, store.latents(concept), numbers)


def _encode_concept(store: Store, concept: str, recipe: Preprocessing, listener: Listener) -> Report:
    started = time.monotonic()
    described, folder = store.concept(concept), store.latents(concept, recipe.key)
    paths = intake.photographs(store.concept_folder(concept))
    stamp = latents_stamp(store, concept, recipe)
    with store.alone("latents", concept, recipe.key):
        if is_current(folder, stamp):
            return Report(stamp, True, time.monotonic() - started, folder)
        base = _base(store)
        base.tokenizer.check_class_noun(described)
        with whole_folder(folder, stamp) as new, store.alone("device"):
            _encode(base, paths, recipe, new, f"encoding {concept}, {recipe.key}", listener)
    return Report(stamp, False, time.monotonic() - started, folder)


def make_class_images(store: Store, class_noun: str, listener: Listener = unheard) -> Report:
    """Pictures of the class noun by the base model, for prior preservation: made once, shared by its concepts.

    As many as the most that a method of params.yaml asks for, and prepared in each way that such a method asks for.
    """
    started = time.monotonic()
    asking = sorted(_asking_for_class_images(store), key=lambda method: _asked_for(store, method), reverse=True)
    made = {method: _class_images_for(store, class_noun, method, listener) for method in asking}
    numbers = {"images": float(class_images_wanted(store))}
    return _report_over(made, started, store.class_images(class_noun), numbers)


def _class_images_for(store: Store, class_noun: str, method: str, listener: Listener) -> Report:
    """The first pictures of the folder that all methods share, as many as this method asks for, and their latents.

    Where too few lie there, more are drawn behind them. So the stamp covers how many the method asked for, and not how
    many there are: another method that wants more changes nothing for this one.
    """
    started = time.monotonic()
    wanted, recipe = _asked_for(store, method), _preprocessing(store, method).of_class_images
    folder = store.class_latents(class_noun, recipe.key)
    encoded, stamp = class_images_stamps(store, class_noun, recipe, wanted)
    with store.alone("class_images", store.class_images(class_noun).name):
        paths, drawn = _draw_class_images(store, class_noun, wanted, listener)
        enough = is_current(folder, encoded) and _pictures_encoded(folder) >= wanted
        if not enough:
            base, what = _base(store), f"encoding class images of {class_noun}, {recipe.key}"
            with whole_folder(folder, encoded) as new, store.alone("device"):
                _encode(base, paths, recipe, new, what, listener)
    return Report(stamp, enough and not drawn, time.monotonic() - started, folder)


def _draw_class_images(store: Store, class_noun: str, wanted: int, listener: Listener) -> tuple[list[Path], bool]:
    """The first pictures, and whether any had to be drawn.

    Always in whole batches, so that the first ones are the same bytes however many are wanted.
    """
    from personalize_core.concept import Concept
    from personalize_core.methods import FLOOR

    params, folder, stamp = store.params, store.class_images(class_noun), pictures_stamp(store, class_noun)
    names = [f"{image:03d}.png" for image in range(-(-wanted // BATCH) * BATCH)]
    kept = [name for name in names if (folder / name).is_file()] if is_current(folder, stamp) else []
    first = [folder / name for name in names[:wanted]]
    if len(kept) == len(names):
        return first, False
    base, kind = _base(store), method_class(FLOOR)
    speaker = kind(kind.Config(), base, Concept.named("class", class_noun))
    # the prior prompt of DreamBooth's recipe; prompt index -1 keeps its noise apart from every grid's
    places = [(-1, image) for image in range(len(kept), len(names))]
    with whole_folder(folder, stamp) as new, store.alone("device"):
        for name in kept:
            shutil.copyfile(folder / name, new / name)
        paths = [new / name for name in names[len(kept) :]]
        prompts, what = [speaker.say("a photo of {}")] * len(places), f"drawing class images of {class_noun}"
        _draw(params.class_images, params.seed, base, speaker, prompts, places, paths, what, listener)
    return first, True


def _encode_real_class_images(store: Store, class_noun: str, method: str, listener: Listener) -> Report:
    """Photographs of the class noun, put into data/regularization by hand: for prior preservation with real images.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    started = time.monotonic()
    recipe = _preprocessing(store, method).of_class_images
    folder = store.real_class_latents(class_noun, recipe.key)
    captioned = intake.captioned(store.regularization(class_noun))
    stamp = real_class_images_stamp(store, class_noun, recipe)
    with store.alone("class_images", f"{store.class_images(class_noun).name}.real"):
        if is_current(folder, stamp):
            return Report(stamp, True, time.monotonic() - started, folder)
        base = _base(store)
        with whole_folder(folder, stamp) as new, store.alone("device"):
            what = f"encoding photographs of {class_noun}, {recipe.key}"
            _encode(base, [path for path, _ in captioned], recipe, new, what, listener)
            write_json(new / CAPTIONS, [caption for _, caption in captioned])
    return Report(stamp, False, time.monotonic() - started, folder)


def _report_over(made: Mapping[str, Report], started: float, folder: Path, numbers: dict[str, float]) -> Report:
    """One report over several."""
    stamp = stamp_of({name: report.stamp for name, report in made.items()})
    skipped = all(report.skipped for report in made.values())
    return Report(stamp, skipped, time.monotonic() - started, folder, numbers)


def train(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """What one method learns about one concept; with its losses, and the loss on a fixed batch before and after.

    A run that was cut off goes on from its last checkpoint, to the same result. What was learned appears only after a
    fresh process has drawn with it just what the trainer draws. What was imported is kept as it is.

    Raises:
        InputError: the concept, the method or its recipe is not usable, or what was imported is not of this method
            and base model; nothing has been computed then.
        ProofFailed: the artifact, read from disk, draws something else.
    """
    from personalize_core.train import Checkpoints

    check_method(method)
    started = time.monotonic()
    folder, described = store.artifact(method, concept), store.concept(concept)
    if _imported(folder):
        _check_artifact(store, concept, method)
        return _trained(_manifest_stamp(folder, ""), True, started, folder)
    config = _recipe(store, method)
    stamp = train_stamp(store, concept, method)  # first: what changes meanwhile then counts as new the next time
    _encode_concept(store, concept, _preprocessing(store, method), listener)
    prior, kind = None, method_class(method)
    if kind.class_images(config):
        class_images = _encode_real_class_images if kind.real_class_images(config) else _class_images_for
        prior = class_images(store, described.class_noun, method, listener).path
    with store.alone("artifact", method, concept):
        if is_current(folder, stamp):
            return _trained(stamp, True, started, folder)
        base = _base(store)
        base.tokenizer.check_class_noun(described)
        with whole_folder(folder, stamp) as new, store.alone("device"):
            _train_into(new, store, base, concept, method, prior, stamp, listener)
        Checkpoints(store.work("checkpoints", method, concept), stamp).clear()
    return _trained(stamp, False, started, folder)


def draw_grid(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Pictures of the concept in every prompt of the list, by each sampling variant of the method.

    Raises:
        InputError: the method has not been trained on the concept, or not on this base model.
    """
    from personalize_core import comparison
    from personalize_core.artifact import restore

    check_method(method)
    started = time.monotonic()
    params, folder = store.params, store.grid(method, concept)
    templates, variants = read_list(store.prompts(params.sampling.prompts)), params.sampling_variants(method)
    artifact = _artifact_stamp(store, concept, method)
    stamp = stamp_of(
        {
            "artifact": artifact,
            "templates": templates,
            "variants": {name: repr(variant.sampling) for name, variant in variants.items()},
            "sampling": params.sampling.model_dump(),
            "precision": params.precision,
            "seed": params.seed,
            "sources": sources_hash([*DRAWING, f"methods/{method_file(method)}"]),
            **_refining(store, concept, method, variants, listener),
        }
    )
    pictures = {"grid": folder / "grid.png"}
    with store.alone("grid", method, concept):
        if is_current(folder, stamp):
            return Report(stamp, True, time.monotonic() - started, folder, {}, pictures)
        base = _base(store)
        trained = restore(store.artifact(method, concept), base, method)
        places = [(p, i) for p in range(len(templates)) for i in range(params.sampling.images_per_prompt)]
        with whole_folder(folder, stamp) as new, store.alone("device"):
            for name, variant in variants.items():
                paths = [new / picture_name(name, prompt, image) for prompt, image in places]
                prompts = [trained.say(templates[prompt]) for prompt, _ in places]
                sampled = _sampled_by(variant, store, concept, method, base, trained, prompts, listener)
                what = f"drawing {concept} by {name}"
                _draw(params.sampling, params.seed, base, sampled, prompts, places, paths, what, listener)
            about = {
                "concept": concept,
                "class_noun": trained.concept.class_noun,
                "method": method,
                "base_model": base.name,
                "templates": templates,
                "images_per_prompt": params.sampling.images_per_prompt,
                "variants": list(variants),
                "sampling": params.sampling.model_dump(),
                "seed": params.seed,
            }
            write_json(new / "grid.json", about)
            comparison.draw(store, concept, [(name, new) for name in variants], about, new / "grid.png")
    return Report(stamp, False, time.monotonic() - started, folder, {}, pictures)


def score(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Every picture of a grid against its text and the concept's photographs, a row per picture and metric."""
    from personalize_core.metrics import scoring

    check_method(method)
    grid = store.grid(method, concept)
    drawn = _manifest_stamp(grid, f"no grid of {concept!r} has been drawn by {method}")

    def table(photographs: list[Path], encoders: scoring.Encoders) -> Any:
        return scoring.score_grid(store.root, grid, photographs, encoders)

    return _score(store, concept, method, drawn, table, listener)


def score_references(store: Store, concept: str, listener: Listener = unheard) -> Report:
    """The concept's photographs against each other: what even real pictures reach."""
    from personalize_core.metrics import scoring

    def table(photographs: list[Path], encoders: scoring.Encoders) -> Any:
        return scoring.score_references(store.root, concept, photographs, encoders)

    return _score(store, concept, REFERENCES, "", table, listener)


def _score(
    store: Store, concept: str, method: str, drawn: str, table: Callable[..., Any], listener: Listener
) -> Report:
    from personalize_core.metrics import scoring, tables
    from personalize_core.models import choose_device

    started = time.monotonic()
    store.concept(concept)
    names, folder = store.params.encoders, store.scores(method, concept)
    stamp = stamp_of(
        {
            "grid": drawn,
            "photographs": intake.content(store.concept_folder(concept)),
            "encoders": [scoring.which(name) for name in (names.text_image, names.identity)],
            "sources": sources_hash(SCORING),
        }
    )
    with store.alone("scores", method, concept):
        skipped = is_current(folder, stamp)
        if not skipped:
            what = f"scoring {concept}, {method}"
            listener(Event(what, 0, 1))
            photographs = intake.photographs(store.concept_folder(concept))
            with whole_folder(folder, stamp) as new, store.alone("device"):
                encoders = scoring.load_encoders(names.text_image, names.identity, choose_device(store.params.device))
                tables.write(table(photographs, encoders), new / SCORES)
            listener(Event(what, 1, 1))
    numbers = scoring.means(tables.read(folder / SCORES))
    return Report(stamp, skipped, time.monotonic() - started, folder / SCORES, numbers)


def compare(store: Store, listener: Listener = unheard) -> Report:
    """All that has been scored in this workspace: one table, one summary, pictures and plots.

    A concept and method of params.yaml without scores is left out, and listed in summary.json as missing. Ablations
    need not stand in params.yaml: each that was drawn by this base model and scored joins.

    Raises:
        InputError: nothing has been scored, or the tables were made by different encoders.
    """
    from personalize_core import comparison

    started, folder = time.monotonic(), store.comparison()
    cells = [
        (method, concept)
        for concept in store.concept_names()
        for method in (*store.params.method_names, *_further_ablations(store, concept), REFERENCES)
    ]
    there = [cell for cell in cells if (store.scores(*cell) / MANIFEST).is_file()]
    if all(method == REFERENCES for method, _ in there):
        raise InputError(f"nothing has been scored in {store.data}; `personalize run` makes whatever is missing")
    stamp = stamp_of(
        {
            "tables": [read_json(store.scores(*cell) / MANIFEST)["stamp"] for cell in there],
            "cells": cells,
            "sources": sources_hash(COMPARING),
        }
    )
    with store.alone("comparison"):
        skipped = is_current(folder, stamp)
        if not skipped:
            listener(Event("comparing", 0, 1))
            with whole_folder(folder, stamp) as new:
                comparison.write(store, there, [cell for cell in cells if cell not in there], new)
            listener(Event("comparing", 1, 1))
    pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
    return Report(stamp, skipped, time.monotonic() - started, folder, {}, pictures)


def _further_ablations(store: Store, concept: str) -> list[str]:
    """Ablations that params.yaml does not name, with scores of pictures by this base model."""
    found = [name for name in ABLATION_NAMES if name not in store.params.method_names]
    scored = [name for name in found if (store.scores(name, concept) / MANIFEST).is_file()]
    return [name for name in scored if _drawn_by(store.grid(name, concept)) == store.params.base_model]


def _drawn_by(grid: Path) -> str | None:
    """The name of the base model; None if there is no grid."""
    try:
        return read_json(grid / "grid.json")["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_samples(
    store: Store,
    concept: str,
    method: str,
    prompts: Sequence[str],
    images: int,
    variant: str | None = None,
    listener: Listener = unheard,
) -> Report:
    """Pictures for prompts of the user's own, `images` for each, beside their prompts in samples.json.

    Raises:
        InputError: a prompt does not mention the concept, or there is no such variant or artifact.
    """
    from personalize_core.artifact import restore

    check_method(method)
    started, params, described = time.monotonic(), store.params, store.concept(concept)
    templates, variants = [described.template(prompt) for prompt in prompts], params.sampling_variants(method)
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise InputError(f"{method} has no variant {variant!r} in params.yaml; it has {listed(variants)}")
    request = {
        "artifact": _artifact_stamp(store, concept, method),
        "templates": templates,
        "images": images,
        "variant": repr(variants[variant].sampling),
        "sampling": params.sampling.model_dump(),
        "seed": params.seed,
        **_refining(store, concept, method, {variant: variants[variant]}, listener),
    }
    stamp = stamp_of(request)
    folder = store.samples(method, concept, stamp)
    places = [(prompt, image) for prompt in range(len(templates)) for image in range(images)]
    pictures = {f"{templates[p]} {i + 1}": folder / picture_name(variant, p, i) for p, i in places}
    if is_current(folder, stamp):
        return Report(stamp, True, time.monotonic() - started, folder, {}, pictures)
    base = _base(store)
    trained = restore(store.artifact(method, concept), base, method)
    with whole_folder(folder, stamp) as new, store.alone("device"):
        said = [trained.say(templates[prompt]) for prompt, _ in places]
        sampled = _sampled_by(variants[variant], store, concept, method, base, trained, said, listener)
        paths = [new / picture_name(variant, prompt, image) for prompt, image in places]
        what = f"drawing {concept} by {variant}"
        _draw(params.sampling, params.seed, base, sampled, said, places, paths, what, listener)
        write_json(new / "samples.json", {"concept": concept, "method": method, "prompts": said, **request})
    return Report(stamp, False, time.monotonic() - started, folder, {}, pictures)


def heat_maps(
    store: Store, concept: str, method: str, prompt: str, image: int = 0, listener: Listener = unheard
) -> Report:
    """Where one picture's attention looked for each word of its prompt, a row for each sampling variant of the method.

    Beside the picture of all maps, every variant's are kept as they are: maps.safetensors, (words, 64, 64), and in
    heat_maps.json the words and what is read off the maps.

    Args:
        prompt: of the user's own, with the placeholder.
        image: which picture of the prompt; equal numbers share their first noise.

    Raises:
        InputError: the prompt does not mention the concept, or there is no such artifact.
    """
    from personalize_core.analyses import heat_maps as analysis
    from personalize_core.artifact import restore
    from personalize_core.files import save_tensors

    check_method(method)
    started, params, template = time.monotonic(), store.params, store.concept(concept).template(prompt)
    variants = params.sampling_variants(method)
    request = {
        "artifact": _artifact_stamp(store, concept, method),
        "template": template,
        "image": image,
        "variants": {name: repr(variant.sampling) for name, variant in variants.items()},
        "sampling": params.sampling.model_dump(),
        "precision": params.precision,
        "seed": params.seed,
        "sources": sources_hash([*DRAWING, f"methods/{method_file(method)}", "analyses/heat_maps"]),
        **_refining(store, concept, method, variants, listener),
    }
    stamp = stamp_of(request)
    folder = store.samples(method, concept, stamp)
    pictures = {"heat maps": folder / "heat_maps.png"}
    if is_current(folder, stamp):
        return Report(stamp, True, time.monotonic() - started, folder, {}, pictures)
    base = _base(store)
    trained = restore(store.artifact(method, concept), base, method)
    with whole_folder(folder, stamp) as new, store.alone("device"):
        said, found = trained.say(template), {}
        for done, (name, variant) in enumerate(variants.items()):
            listener(Event(f"watching {concept} by {method}", done, len(variants)))
            sampled = _sampled_by(variant, store, concept, method, base, trained, [said], listener)
            found[name] = _watched(params, base, sampled, said, image)
        listener(Event(f"watching {concept} by {method}", len(variants), len(variants)))
        save_tensors(new / "maps.safetensors", {name: maps.maps for name, maps in found.items()})
        read = {name: analysis.numbers(maps) for name, maps in found.items()}
        write_json(new / "heat_maps.json", {"prompt": said, **request, "maps": read})
        pictured = {name: base.decode(maps.latents)[0].numpy() for name, maps in found.items()}
        analysis.draw(found, pictured, new / "heat_maps.png", title=said)
    return Report(stamp, False, time.monotonic() - started, folder, {}, pictures)


def _watched(params: Params, base: BaseModel, method: Method, said: str, image: int) -> HeatMaps:
    from personalize_core.analyses.heat_maps import heat_maps
    from personalize_core.sample import initial_noise, make_sampler

    sampler, noise = make_sampler(params.sampling.sampler, base), initial_noise(base, params.seed, [(0, image)])
    return heat_maps(method, base, said, noise, sampler, params.sampling.steps, params.sampling.guidance)


def draw_together(
    store: Store, cells: Sequence[tuple[str, str]], prompts: Sequence[str], images: int, listener: Listener = unheard
) -> Report:
    """Pictures that show several concepts at once, `images` for each prompt, beside their prompts in samples.json.

    Args:
        cells: (concept, method) of each artifact.

    Returns:
        A report whose numbers are, under "PART.CONCEPT", the mean identity of each part of the pictures with each
        concept; "PART" is the concept that the prompt puts there, from left to right.

    Raises:
        InputError: a prompt lacks a concept, there is no such artifact, or one that cannot be confined to a region.
    """
    from personalize_core.artifact import restore
    from personalize_core.metrics import scoring
    from personalize_core.together import Together

    started, params = time.monotonic(), store.params
    for prompt in prompts:
        for concept, method in cells:
            check_method(method)
            store.concept(concept).template(prompt)
    request = {
        "artifacts": [_artifact_stamp(store, concept, method) for concept, method in cells],
        "prompts": list(prompts),
        "images": images,
        "sampling": params.sampling.model_dump(),
        "seed": params.seed,
        "encoder": scoring.which(params.encoders.identity),
        "photographs": [intake.content(store.concept_folder(concept)) for concept, _ in cells],
        "sources": sources_hash([*DRAWING, "together", "metrics/features", "metrics/side_by_side"]),
    }
    stamp = stamp_of(request)
    folder = store.samples("together", "+".join(concept for concept, _ in cells), stamp)
    places = [(prompt, image) for prompt in range(len(prompts)) for image in range(images)]
    pictures = {f"{prompts[p]} {i + 1}": folder / picture_name("together", p, i) for p, i in places}
    if is_current(folder, stamp):
        numbers = read_json(folder / "samples.json")["identity"]
        return Report(stamp, True, time.monotonic() - started, folder, numbers, pictures)
    base = _base(store)
    together = Together([restore(store.artifact(method, concept), base, method) for concept, method in cells], base)
    with whole_folder(folder, stamp) as new, store.alone("device"):
        said = [together.say(prompts[prompt]) for prompt, _ in places]
        paths = [new / picture_name("together", prompt, image) for prompt, image in places]
        what = f"drawing {' and '.join(concept for concept, _ in cells)}"
        _draw(params.sampling, params.seed, base, together, said, places, paths, what, listener)
        numbers = _identity_of_parts(store, [concept for concept, _ in cells], paths, [prompts[p] for p, _ in places])
        about = {"cells": [list(cell) for cell in cells], "said": said, "identity": numbers, **request}
        write_json(new / "samples.json", about)
    return Report(stamp, False, time.monotonic() - started, folder, numbers, pictures)


def _identity_of_parts(
    store: Store, concepts: Sequence[str], paths: Sequence[Path], prompts: Sequence[str]
) -> dict[str, float]:
    """Means over the pictures, of which each has the concepts from left to right as its prompt names them."""
    from personalize_core.data import load_picture
    from personalize_core.metrics.features import load_identity_encoder
    from personalize_core.metrics.side_by_side import identity_of_parts
    from personalize_core.models import choose_device

    encoder = load_identity_encoder(store.params.encoders.identity, choose_device(store.params.device))
    references = [[load_picture(p) for p in intake.photographs(store.concept_folder(name))] for name in concepts]
    found: dict[str, list[float]] = {f"{part}.{name}": [] for part in concepts for name in concepts}
    alike = identity_of_parts([load_picture(path) for path in paths], references, encoder).tolist()
    for columns, prompt in zip(alike, prompts, strict=True):
        parts = sorted(concepts, key=lambda name: prompt.index(store.concept(name).placeholder))
        for part, column in zip(parts, columns, strict=True):
            for name, value in zip(concepts, column, strict=True):
                found[f"{part}.{name}"].append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def export(store: Store, concept: str, method: str, to: Path) -> Report:
    """An artifact in the format that stock diffusers loads, with a README.md that says how.

    Raises:
        InputError: there is no artifact, no such format, or `to` exists.
    """
    from personalize_core.artifact import restore

    check_method(method)
    started = time.monotonic()
    if to.exists():
        raise InputError(f"{to} exists already; name a folder that does not, so that nothing is overwritten")
    stamp, artifact = _artifact_stamp(store, concept, method), store.artifact(method, concept)
    base = _base(store)
    with whole_folder(to, stamp) as new:
        how = restore(artifact, base, method).export(base, new)
        (new / "README.md").write_text(f"{concept}, learned by {method} on {base.name} ({base.revision}).\n\n{how}\n")
    files = {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()}
    return Report(stamp, False, time.monotonic() - started, to, {}, files)


def import_artifact(store: Store, concept: str, method: str, source: Path) -> Report:
    """What another program learned, as an artifact: drawn and scored like any, and kept until its folder is removed.

    Args:
        source: a file or folder in the format that `export` writes for the method.

    Raises:
        InputError: it cannot be read, does not fit the base model, or there is an artifact already.
    """
    from personalize_core import artifact, training_log
    from personalize_core.interchange import refuse_pickle

    check_method(method)
    started, folder = time.monotonic(), store.artifact(method, concept)
    config, described = store.params.config(method), store.concept(concept)
    if not source.exists():
        raise InputError(f"{source} does not exist")
    refuse_pickle(source)
    if folder.exists():
        raise InputError(f"{method} has learned {concept!r} already; remove {folder} first")
    base = _base(store)
    base.tokenizer.check_class_noun(described)
    learner = method_class(method).imported(config, base, described, source)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    stamp = stamp_of(
        {
            "imported": {path.name: sha256(path) for path in files},
            "method": method,
            "concept": vars(described),
            "config": repr(config),
            "base_model": identify(store.params.base_model).weights_hash,
        }
    )
    with store.alone("artifact", method, concept), whole_folder(folder, stamp) as new:
        artifact.save(new, method, learner, base, seed=None, imported=source.name)
        training_log.write([], new)
    return _trained(stamp, False, started, folder)


def check_inputs(store: Store, concepts: Sequence[str], methods: Sequence[str]) -> None:
    """Raise InputError for anything that would stop a run later: reads every file, and trains and draws nothing.

    What only the base model can tell is asked of it, once, if there is anything to train: whether its tokenizer can
    place each class noun, and whether each method can be made for it.
    """
    for method in methods:
        check_method(method)
        _recipe(store, method)
        store.params.sampling_variants(method)
    identify(store.params.base_model)
    read_list(store.prompts(store.params.sampling.prompts))
    for concept in concepts:
        described = store.concept(concept)
        photographs = len(intake.photographs(store.concept_folder(concept)))
        if any(method_class(name).real_class_images(store.params.config(name)) for name in methods):
            intake.captioned(store.regularization(described.class_noun))
        for method in methods:
            if _imported(store.artifact(method, concept)):
                _check_artifact(store, concept, method)
            _check_photographs(store, concept, photographs, method)
    cells = [(concept, method) for concept in concepts for method in methods]
    _check_on_base(store, [cell for cell in cells if not _kept(store, *cell)])


def _check_photographs(store: Store, concept: str, photographs: int, method: str) -> None:
    kind, config = method_class(method), store.params.config(method)
    for name, variant in store.params.sampling_variants(method).items():
        needed = kind.photographs_needed(config, variant.sampling)
        if needed > photographs:
            raise InputError(
                f"params.yaml, variants.{method}.{name}: it takes {needed} photographs of a concept, and {concept!r} "
                f"has {photographs}; change these options, or leave this concept out"
            )


def _kept(store: Store, concept: str, method: str) -> bool:
    """Would training leave this artifact as it is?"""
    folder = store.artifact(method, concept)
    return _imported(folder) or is_current(folder, train_stamp(store, concept, method))


def _check_on_base(store: Store, cells: Sequence[tuple[str, str]]) -> None:
    """Raise InputError unless each (concept, method) can be trained on this base model.

    A method is made once for each class noun: what else a concept has, a name and a placeholder, is as good as another.
    """
    if not cells:
        return
    base, made = _base(store), set()
    for concept, _ in cells:
        base.tokenizer.check_class_noun(store.concept(concept))
    for concept, method in cells:
        described = store.concept(concept)
        if (method, described.class_noun) not in made:
            made.add((method, described.class_noun))
            try:
                _untrained(store, base, concept, method)  # and given up at once
            except InputError as error:
                raise InputError(f"{method} cannot be trained on {concept!r}: {error}") from None


# Stamps


def train_stamp(store: Store, concept: str, method: str) -> str:
    """Names everything that an artifact depends on: of the latents, only what this method sees."""
    params, described = store.params, store.concept(concept)
    kind, config, recipe = method_class(method), params.config(method), _preprocessing(store, method)
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


def latents_stamp(store: Store, concept: str, recipe: Preprocessing) -> str:
    """Names everything that the moments of a concept's photographs depend on, prepared in one way."""
    files = intake.content(store.concept_folder(concept))
    return stamp_of({"files": files, **_encoding(store, recipe)})


def pictures_stamp(store: Store, class_noun: str) -> str:
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


def class_images_wanted(store: Store) -> int:
    """The most class images that any method of params.yaml asks the base model for; 0 if none does."""
    return max((_asked_for(store, method) for method in _asking_for_class_images(store)), default=0)


def _asking_for_class_images(store: Store) -> list[str]:
    """The methods of params.yaml that want pictures of the class noun by the base model."""
    recipes = [(name, method_class(name), store.params.config(name)) for name in store.params.method_names]
    return [name for name, kind, c in recipes if kind.class_images(c) and not kind.real_class_images(c)]


def _asked_for(store: Store, method: str) -> int:
    return method_class(method).class_images(store.params.config(method))


def _artifact_stamp(store: Store, concept: str, method: str) -> str:
    """Of the method's artifact, if it is one of this base model."""
    stamp = _manifest_stamp(store.artifact(method, concept), f"{method} has not been trained on {concept!r}")
    _check_artifact(store, concept, method)
    return stamp


def _check_artifact(store: Store, concept: str, method: str) -> None:
    from personalize_core import artifact

    about = identify(store.params.base_model)
    artifact.check(store.artifact(method, concept), method, about.name, about.weights_hash)


def _manifest_stamp(folder: Path, what_is_missing: str) -> str:
    try:
        return read_json(folder / MANIFEST)["stamp"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{what_is_missing}; `personalize run` makes whatever is missing") from None


# What the steps share


def _base(store: Store) -> BaseModel:
    return load_base_model(store.params.base_model, store.params.device, store.params.precision)


def _recipe(store: Store, method: str) -> Any:
    """The method's Config, where it can be trained as params.yaml says."""
    config = store.params.config(method)
    if store.params.gradient_checkpointing and method_class(method).losses_read_attention(config):
        raise InputError(
            f"gradient_checkpointing runs the U-Net again for the gradient, and a loss of {method} looks at the "
            "attention of the first run, so it would teach nothing; write `gradient_checkpointing: false` in "
            "params.yaml, or leave this method out"
        )
    return config


def _preprocessing(store: Store, method: str) -> Preprocessing:
    return method_class(method).preprocessing_for(store.params.config(method))


def _encode(
    base: BaseModel, paths: Sequence[Path], recipe: Preprocessing, folder: Path, what: str, listener: Listener
) -> None:
    """Write the moments of all pictures in one file; the tensor "000" holds the first picture's views."""
    import torch

    from personalize_core.data import load_picture, to_pixels
    from personalize_core.files import save_tensors

    moments = {}
    for index, path in enumerate(paths):
        views = recipe.views(load_picture(path), base.image_size)
        moments[f"{index:03d}"] = base.moments(to_pixels(views))
        listener(Event(what, index + 1, len(paths)))
    if not all(torch.isfinite(tensor).all() for tensor in moments.values()):
        raise FloatingPointError(f"{what}: the autoencoder gave numbers that are not finite")
    save_tensors(folder / MOMENTS, moments)


def _pictures_encoded(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / MOMENTS, "numpy") as opened:
        return len(opened.keys())


def _latents(store: Store, concept: str, method: str, class_images: Path | None) -> ConceptLatents:
    """What the method sees; class_images: the folder of their moments, where it asks for them."""
    from safetensors.torch import load_file

    from personalize_core.data import ConceptLatents

    def read(folder: Path) -> list:
        saved = load_file(folder / MOMENTS)
        return [saved[name] for name in sorted(saved, key=int)]

    own = read(store.latents(concept, _preprocessing(store, method).key))
    if class_images is None:
        return ConceptLatents(own)
    if (class_images / CAPTIONS).is_file():
        return ConceptLatents(own, read(class_images), read_json(class_images / CAPTIONS))
    return ConceptLatents(own, read(class_images)[: _asked_for(store, method)])


def _untrained(store: Store, base: BaseModel, concept: str, method: str) -> Method:
    """The method as its training starts."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed_for(store.params.seed, method_file(method), "start"))  # an ablation's as its method's
        return method_class(method)(_recipe(store, method), base, store.concept(concept))


def _train_into(
    folder: Path,
    store: Store,
    base: BaseModel,
    concept: str,
    method: str,
    class_images: Path | None,
    stamp: str,
    listener: Listener,
) -> None:
    from personalize_core import artifact, proof, training_log
    from personalize_core import train as training
    from personalize_core.fixed_batch import fixed_batch_losses, improvement

    learner, seed = _untrained(store, base, concept, method), store.params.seed
    images = _latents(store, concept, method, class_images)
    stages = learner.stages()
    total = sum(stage.steps for stage in stages)
    before = fixed_batch_losses(learner, base, images, seed)

    done = {stage.name: sum(earlier.steps for earlier in stages[:number]) for number, stage in enumerate(stages)}

    def log(row: dict[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        listener(Event(f"training {method} on {concept}", done[row["stage"]] + row["step"] + 1, total, numbers))

    checkpoints = training.Checkpoints(store.work("checkpoints", method, concept), stamp)
    with proof.FreshProcess(base) if total else nullcontext() as fresh:  # without training there is nothing to prove
        with base.recomputing() if store.params.gradient_checkpointing else nullcontext():
            rows = training.train(learner, base, images, seed, log, checkpoints)
        artifact.save(folder, method, learner, base, seed)
        if fresh:
            fresh.restore(folder)
        after = fixed_batch_losses(learner, base, images, seed)
        write_json(folder / "fixed_batch.json", improvement(before, after, seed))
        training_log.write(rows, folder)
        if fresh:
            write_json(folder / PROOF, proof.compare(proof.answer(learner, base), fresh.answer(), base))


def _imported(folder: Path) -> bool:
    """Does the folder hold what another program learned?"""
    try:
        return bool(read_json(folder / "config.json").get("imported"))
    except (OSError, ValueError, AttributeError):
        return False


def _trained(stamp: str, skipped: bool, started: float, folder: Path) -> Report:
    numbers = {"parameters": float(read_json(folder / "config.json")["parameters"])}
    if (folder / "fixed_batch.json").is_file():  # not with what was imported
        fixed = read_json(folder / "fixed_batch.json")
        numbers |= {
            "fixed_batch_loss_before": fixed["before"],
            "fixed_batch_loss_after": fixed["after"],
            "fixed_batch_loss_fell_by": fixed["fell_by"],
            "fell_by_at_least": fixed["interval_95"][0],
            "fell_by_at_most": fixed["interval_95"][1],
        }
    if (folder / PROOF).is_file():
        numbers["restored_draws_otherwise_by"] = read_json(folder / PROOF)["largest_difference"]
    pictures = {"loss": folder / "loss.png"} if (folder / "loss.png").is_file() else {}
    return Report(stamp, skipped, time.monotonic() - started, folder, numbers, pictures)


def _refining(
    store: Store, concept: str, method: str, variants: Mapping[str, Variant], listener: Listener
) -> dict[str, Any]:
    """What pictures depend on besides, where a variant asks for test-time optimization; else nothing.

    It looks at the concept's photographs, which may be others by now than those that the artifact was trained on.
    """
    refined = {name: repr(variant.refinement) for name, variant in variants.items() if variant.refinement}
    if not refined:
        return {}
    latents = _encode_concept(store, concept, _preprocessing(store, method), listener).stamp
    return {"refinement": refined, "latents": latents, "refining_sources": sources_hash(REFINING)}


def _sampled_by(
    variant: Variant,
    store: Store,
    concept: str,
    method: str,
    base: BaseModel,
    trained: Method,
    prompts: Sequence[str],
    listener: Listener,
) -> Method:
    """What was learned, ready to draw these prompts in one variant; the artifact stays as it is."""
    from personalize_core.context_regularization import ContextRefined

    trained.sampling = variant.sampling
    if not variant.refinement:
        return trained
    refined = ContextRefined(trained, _latents(store, concept, method, None), store.params.seed, variant.refinement)
    what = f"refining {concept} for the prompts of {variant.name}"
    refined.refine(base, prompts, lambda done, steps, loss: listener(Event(what, done, steps, {"loss": loss})))
    return refined


def _draw(
    how: Drawing,
    seed: int,
    base: BaseModel,
    method: Method,
    prompts: Sequence[str],
    places: Sequence[tuple[int, int]],
    paths: Iterable[Path],
    what: str,
    listener: Listener,
) -> None:
    """Draw one picture per prompt, a few at a time; places are (prompt index, image index), which choose the noise."""
    from PIL import Image

    from personalize_core.sample import initial_noise, make_sampler, sample

    paths = list(paths)
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        sampler = make_sampler(
            how.sampler,
            base,
            lambda done, steps, start=start: listener(
                Event(what, start * steps + done * min(BATCH, len(prompts) - start), len(prompts) * steps)
            ),
        )
        noise = initial_noise(base, seed, places[rows])
        pixels = base.decode(sample(method, base, prompts[rows], noise, sampler, how.steps, how.guidance))
        for path, picture in zip(paths[rows], pixels, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(path)


def picture_name(variant: str, prompt: int, image: int) -> str:
    """Where a picture lies in its grid's folder."""
    return f"{variant}/{prompt:02d}_{image:02d}.png"
