"""Images that somebody asks for: prompts of their own, heat maps, several concepts together, a way between two."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept import SLOT, check_placeholders
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import is_up_to_date, read_json, write_json
from personalize_core.files.stamps import sources_hash, stamp_of
from personalize_core.methods import BASELINE, method_class
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.report.display_names import in_words
from personalize_core.sampling.grid import image_name
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.sampling import ready_to_sample, refining, sample_images
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import device_of, load_base, split_of
from personalize_core.workspace.stamps.common import computed_by
from personalize_core.workspace.stamps.made import artifact_stamp
from personalize_core.workspace.stamps.sampling import sampling_sources
from personalize_core.workspace.stamps.sources import ENCODERS, SAMPLING
from personalize_core.workspace.store import Store

MOST_SHOWN = 90  # characters of a prompt beside its images

if TYPE_CHECKING:
    from PIL import Image

    from personalize_core.analyses.heat_maps import HeatMaps
    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.concept import Concept
    from personalize_core.methods.interface import Method


def sample_prompts(
    store: Store,
    concept: str,
    method: str,
    prompts: Sequence[str],
    images: int,
    variant: str | None = None,
    listener: Listener = unheard,
) -> Report:
    """Images for prompts of the user's own, `images` for each, beside their prompts in samples.json.

    Raises:
        InputError: a prompt does not mention the concept or mentions another, or there is no such variant or artifact.
    """
    from personalize_core.artifacts.saving import restore

    store.params.check_method(method)
    started, params, described = time.monotonic(), store.params, store.concept(concept)
    templates, variants = [_template(described, prompt) for prompt in prompts], params.sampling_variants(method)
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise InputError(f"{method} has no variant {variant!r} in params.yaml; it has {listed(variants)}")
    request = {
        "artifact": artifact_stamp(store, concept, method),
        "templates": templates,
        "images": images,
        "variant": repr(variants[variant].sampling),
        "sampling": params.sampling.how(),
        "seed": store.sampling_seed,
        "precision": params.precision,
        **computed_by(store),
        "sources": sampling_sources(method),
        **refining(store, concept, method, {variant: variants[variant]}, listener),
    }
    stamp = stamp_of(request)
    folder = store.samples(method, concept, stamp)
    places = [(prompt, image) for prompt in range(len(templates)) for image in range(images)]
    named = {f"{prompts[p]} {i + 1}": folder / image_name(variant, p, i) for p, i in places}
    if is_up_to_date(folder, stamp):
        return Report(stamp, True, time.monotonic() - started, folder, {}, named)
    with making(store, folder, stamp) as new, store.device():
        base = load_base(store)
        trained = restore(store.artifact(method, concept), base, method)
        said = [trained.say(templates[prompt]) for prompt, _ in places]
        sampled = ready_to_sample(variants[variant], store, concept, method, base, trained, said, listener)
        paths = [new / image_name(variant, prompt, image) for prompt, image in places]
        what = f"sampling {concept} by {variant}"
        sample_images(params.sampling, store.sampling_seed, base, sampled, said, places, paths, what, listener)
        write_json(new / "samples.json", {"concept": concept, "method": method, "prompts": said, **request})
    return Report(stamp, False, time.monotonic() - started, folder, {}, named)


def heat_maps(
    store: Store,
    concept: str,
    method: str,
    prompt: str,
    image: int = 0,
    listener: Listener = unheard,
    nouns: Sequence[str] = (),
) -> Report:
    """Where one image's attention looked for each word of its prompt, a row for each sampling variant of the method.

    Beside the image of all maps, every variant's are kept as they are: maps.safetensors, (words, 64, 64), and in
    heat_maps.json the words and what is read off the maps.

    Args:
        prompt: of the user's own, with the placeholder.
        image: which image of the prompt; equal numbers share their first noise.
        nouns: words that the base model reads in the concept's place, for rows of another image: CoRe (Wu et al. 2025),
            figure 2.

    Raises:
        InputError: the prompt does not mention the concept, mentions another, or with nouns this one more than once; a
            noun is none; or there is no such artifact.
    """
    from personalize_core.analyses import heat_maps as analysis
    from personalize_core.artifacts.saving import restore
    from personalize_core.files.atomic import save_tensors

    store.params.check_method(method)
    started, params, template = time.monotonic(), store.params, _template(store.concept(concept), prompt)
    variants = params.sampling_variants(method)
    others = {noun: replace(store.concept(concept), class_noun=noun) for noun in nouns}
    if others and template.count(SLOT) > 1:
        raise InputError(f"with other nouns a prompt must name the concept once: {prompt!r}")
    request = {
        "artifact": artifact_stamp(store, concept, method),
        "template": template,
        **({"nouns": list(others)} if others else {}),
        "image": image,
        "variants": {name: repr(variant.sampling) for name, variant in variants.items()},
        "sampling": params.sampling.how(),
        "precision": params.precision,
        "seed": store.sampling_seed,
        **computed_by(store),
        "sources": sampling_sources(method, "analyses/heat_maps"),
        **refining(store, concept, method, variants, listener),
    }
    stamp = stamp_of(request)
    folder = store.samples(method, concept, stamp)
    images = {"heat maps": folder / "heat_maps.png"}
    if others:
        images["other nouns"] = folder / "other_nouns.png"
    if is_up_to_date(folder, stamp):
        return Report(stamp, True, time.monotonic() - started, folder, {}, images)
    with making(store, folder, stamp) as new, store.device():
        base = load_base(store)
        trained = restore(store.artifact(method, concept), base, method)
        said, found = trained.say(template), {}
        for done, (name, variant) in enumerate(variants.items()):
            listener(Event(f"watching {concept} by {method}", done, len(variants)))
            sampled = ready_to_sample(variant, store, concept, method, base, trained, [said], listener)
            found[name] = _watched(store, base, sampled, said, image)
        listener(Event(f"watching {concept} by {method}", len(variants), len(variants)))
        if others:
            _save_other_nouns(store, base, others, found, template, image, new / "other_nouns.png")
        save_tensors(new / "maps.safetensors", {name: maps.maps for name, maps in found.items()})
        read = {name: analysis.metrics(maps) for name, maps in found.items()}
        write_json(new / "heat_maps.json", {"prompt": said, **request, "maps": read})
        imaged = {name: base.decode(maps.latents)[0].numpy() for name, maps in found.items()}
        analysis.save_grid(found, imaged, new / "heat_maps.png", title=said)
    return Report(stamp, False, time.monotonic() - started, folder, {}, images)


def _save_other_nouns(
    store: Store,
    base: BaseModel,
    others: Mapping[str, Concept],
    own: Mapping[str, HeatMaps],
    template: str,
    image: int,
    path: Path,
) -> None:
    """A row for each variant of the method, and one for each noun that the base model reads in the concept's place."""
    from personalize_core.analyses import heat_maps as analysis

    before, behind = (len(base.tokenizer.spelled(part, next(iter(others.values())))) for part in template.split(SLOT))
    plain: Any = method_class(BASELINE)
    found = dict(own)
    for noun, concept in others.items():
        method = plain(plain.Config(), base, concept)
        row = f"{noun} (the noun)" if noun in own else noun  # a variant may be called as a noun is
        found[row] = _watched(store, base, method, method.say(template), image)
    rows = {name: analysis.with_one_slot(maps, before, behind) for name, maps in found.items()}
    imaged = {name: base.decode(maps.latents)[0].numpy() for name, maps in rows.items()}
    analysis.save_grid(rows, imaged, path, title=template.replace(SLOT, analysis.THE_NOUN))


def _watched(store: Store, base: BaseModel, method: Method, said: str, image: int) -> HeatMaps:
    from personalize_core.analyses.heat_maps import heat_maps
    from personalize_core.sampling.sampler import initial_noise, make_sampler, step_generators

    how, seed, place = store.params.sampling, store.sampling_seed, [(0, image)]
    sampler = make_sampler(how.sampler, base, eta=how.eta, generators=step_generators(seed, place))
    return heat_maps(method, base, said, initial_noise(base, seed, place), sampler, how.steps, how.guidance)


def sample_several_concepts(
    store: Store, cells: Sequence[tuple[str, str]], prompts: Sequence[str], images: int, listener: Listener = unheard
) -> Report:
    """Images that show several concepts at once, `images` for each prompt, beside their prompts in samples.json.

    Args:
        cells: (concept, method) of each artifact.

    Returns:
        A report whose numbers are, under "PART.CONCEPT", the mean identity of each part of the images with each
        concept; "PART" is the concept that the prompt puts there, from left to right.

    Raises:
        InputError: a prompt lacks a concept or has another, there is no such artifact, or one that cannot be confined
            to a region.
    """
    from personalize_core.artifacts.saving import restore
    from personalize_core.sampling.several_concepts import Together

    started, params = time.monotonic(), store.params
    for _, method in cells:
        store.params.check_method(method)
    described = [store.concept(concept) for concept, _ in cells]
    for prompt in prompts:
        for concept in described:
            concept.template(prompt)
        check_placeholders(prompt, described)
    request = {
        "artifacts": [artifact_stamp(store, concept, method) for concept, method in cells],
        "prompts": list(prompts),
        "images": images,
        "sampling": params.sampling.how(),
        "seed": store.sampling_seed,
        "precision": params.precision,
        **computed_by(store),
        **_compared_with(store, [concept for concept, _ in cells]),
        "sources": sources_hash([*SAMPLING, *ENCODERS, "sampling/several_concepts", "metrics/several_concepts"]),
    }
    stamp = stamp_of(request)
    folder = store.samples("together", "+".join(concept for concept, _ in cells), stamp)
    places = [(prompt, image) for prompt in range(len(prompts)) for image in range(images)]
    named = {f"{prompts[p]} {i + 1}": folder / image_name("together", p, i) for p, i in places}
    if is_up_to_date(folder, stamp):
        metrics = read_json(folder / "samples.json")["identity"]
        return Report(stamp, True, time.monotonic() - started, folder, metrics, named)
    with making(store, folder, stamp) as new, store.device():
        base = load_base(store)
        together = Together([restore(store.artifact(method, concept), base, method) for concept, method in cells], base)
        said = [together.say(prompts[prompt]) for prompt, _ in places]
        paths = [new / image_name("together", prompt, image) for prompt, image in places]
        what = f"sampling {' and '.join(concept for concept, _ in cells)}"
        sample_images(params.sampling, store.sampling_seed, base, together, said, places, paths, what, listener)
        metrics = _identity_of_parts(store, [concept for concept, _ in cells], paths, [prompts[p] for p, _ in places])
        about = {"cells": [list(cell) for cell in cells], "said": said, "identity": metrics, **request}
        write_json(new / "samples.json", about)
    return Report(stamp, False, time.monotonic() - started, folder, metrics, named)


def sample_between(
    store: Store,
    cells: tuple[tuple[str, str], tuple[str, str]],
    prompts: Sequence[str],
    points: int,
    images: int,
    listener: Listener = unheard,
) -> Report:
    """Images on the way from one concept's word to another's, each way from one noise; see sampling/interpolation.py.

    Beside the images of each point strips.png has a row for each way, under its prompt and noise, and samples.json the
    prompts.

    Args:
        cells: (concept, method) of both artifacts.
        prompts: of the user's own, with the first concept's placeholder.
        points: how many words, evenly spread, the two learned ones among them.
        images: ways of each prompt.

    Returns:
        A report whose numbers are, under "SHARE.CONCEPT", the mean identity of the images at each share of the way
        with each concept.

    Raises:
        InputError: a method learns more than a word, there is no such concept or artifact, both are one, there are
            fewer than three points, or a prompt does not mention the first concept or mentions another.
    """
    from personalize_core.artifacts.saving import restore
    from personalize_core.report.figures.image_grids import comparison_grid
    from personalize_core.sampling.interpolation import Between, check_learns_a_word_alone

    started, params, names = time.monotonic(), store.params, [concept for concept, _ in cells]
    for _, method in cells:
        store.params.check_method(method)
        check_learns_a_word_alone(method)
    described = [store.concept(name) for name in names]
    if len(set(names)) < 2:
        raise InputError(f"{names[0]!r} is named twice; a way leads from one concept to another")
    if points < 3:
        raise InputError(f"{points} points are no way; it takes three at least, the two learned words among them")
    templates = [_template(described[0], prompt) for prompt in prompts]
    request = {
        "artifacts": [artifact_stamp(store, concept, method) for concept, method in cells],
        "prompts": list(prompts),
        "points": points,
        "images": images,
        "sampling": params.sampling.how(),
        "seed": store.sampling_seed,
        "precision": params.precision,
        **computed_by(store),
        **_compared_with(store, names),
        "sources": sources_hash([*SAMPLING, *ENCODERS, "sampling/interpolation"]),
    }
    stamp = stamp_of(request)
    folder = store.samples("between", "+".join(names), stamp)
    shares = [f"{point / (points - 1):.3f}" for point in range(points)]
    places = [(prompt, image) for prompt in range(len(prompts)) for image in range(images)]
    shown = {"strips": folder / "strips.png"}
    if is_up_to_date(folder, stamp):
        metrics = read_json(folder / "samples.json")["identity"]
        return Report(stamp, True, time.monotonic() - started, folder, metrics, shown)
    with making(store, folder, stamp) as new, store.device():
        base = load_base(store)
        first, second = (restore(store.artifact(method, concept), base, method) for concept, method in cells)
        said = [first.say(templates[prompt]) for prompt, _ in places]
        paths = {share: [new / image_name(share, prompt, image) for prompt, image in places] for share in shares}
        for point, share in enumerate(shares):
            word = Between(first, second, point / (points - 1), base.text_encoders.widths)
            what = f"sampling {share} of the way from {names[0]} to {names[1]}"
            sample_images(params.sampling, store.sampling_seed, base, word, said, places, paths[share], what, listener)
        rows = {
            f"{number}. {shorten(prompts[prompt], MOST_SHOWN, placeholder=' …')}, noise {image + 1}": [
                [paths[share][number - 1]] for share in shares
            ]
            for number, (prompt, image) in enumerate(places, start=1)
        }
        on_the_way = [f"{name}, by {in_words(method)}" for name, method in cells]
        columns = [on_the_way[0], *(f"{share} of the way" for share in shares[1:-1]), on_the_way[1]]
        comparison_grid([], rows, columns, new / "strips.png", f"From {names[0]} to {names[1]}")
        metrics = _identity_of_points(store, names, paths)
        about = {"cells": [list(cell) for cell in cells], "said": said, "identity": metrics, **request}
        write_json(new / "samples.json", about)
    return Report(stamp, False, time.monotonic() - started, folder, metrics, shown)


def _template(concept: Concept, prompt: str) -> str:
    """A user's prompt as a template, in which the concept is the only one."""
    template = concept.template(prompt)
    check_placeholders(prompt, [concept])
    return template


def _identity_of_points(store: Store, concepts: Sequence[str], paths: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Means over the images of each share, under "SHARE.CONCEPT"."""
    from personalize_core.concepts.image_files import load_image
    from personalize_core.metrics.encoders import load_identity_encoder
    from personalize_core.metrics.similarity import image_alignment_per_image

    encoder = load_identity_encoder(store.params.encoders.identity[0], device_of(store))
    references = [encoder.images(shown) for shown in _references(store, concepts)]
    features = {share: encoder.images([load_image(path) for path in made]) for share, made in paths.items()}
    return {
        f"{share}.{name}": float(image_alignment_per_image(own, known, encoder.looks_for).mean())
        for share, own in features.items()
        for name, known in zip(concepts, references, strict=True)
    }


def _compared_with(store: Store, concepts: Sequence[str]) -> dict[str, Any]:
    """What identities with these concepts depend on."""
    return {
        "encoder": weights_of(store.params.encoders.identity[0]),
        "concept_images": [concept_files.content(store.concept_folder(name)) for name in concepts],
        **({"held_out": [list(split_of(store, name).held_out) for name in concepts]} if store.params.held_out else {}),
    }


def _references(store: Store, concepts: Sequence[str]) -> list[list[Image.Image]]:
    """Of each concept the images that are held out, where it has some, else all of them."""
    from personalize_core.concepts.image_files import load_image

    return [
        [
            load_image(path)
            for path in concept_files.concept_images(store.concept_folder(name), split_of(store, name).held_out or None)
        ]
        for name in concepts
    ]


def _identity_of_parts(
    store: Store, concepts: Sequence[str], paths: Sequence[Path], prompts: Sequence[str]
) -> dict[str, float]:
    """Means over the images, of which each has the concepts from left to right as its prompt names them.

    Images are compared with the concept images that are held out, where a concept has some, else with all of them.
    """
    from personalize_core.concepts.image_files import load_image
    from personalize_core.metrics.encoders import load_identity_encoder
    from personalize_core.metrics.several_concepts import identity_of_parts

    encoder = load_identity_encoder(store.params.encoders.identity[0], device_of(store))
    references = _references(store, concepts)
    found: dict[str, list[float]] = {f"{part}.{name}": [] for part in concepts for name in concepts}
    alike = identity_of_parts([load_image(path) for path in paths], references, encoder).tolist()
    for columns, prompt in zip(alike, prompts, strict=True):
        parts = sorted(concepts, key=lambda name: prompt.index(store.concept(name).placeholder))
        for part, column in zip(parts, columns, strict=True):
            for name, value in zip(concepts, column, strict=True):
                found[f"{part}.{name}"].append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}
