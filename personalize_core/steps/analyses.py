"""What a comparison's headline hides, and the papers' analyses, of one method on one concept; and class nouns.

Of an external column there are the analyses that need images alone.

One folder for each, with analyses.json: for every analysis its numbers, images and tables with their captions, or
why it is not defined here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.concepts import concept_files
from personalize_core.concepts.masks import own_content
from personalize_core.errors import InputError
from personalize_core.files.atomic import (
    MANIFEST,
    has_this_format,
    is_up_to_date,
    read_json,
    read_record,
    read_result,
    whole_folder,
    write_json,
)
from personalize_core.files.stamps import sha256_or_none, sources_hash, stamp_of
from personalize_core.methods import BASELINE, method_of, method_source
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.randomness import seed_for
from personalize_core.sampling.grid import DESCRIPTION, image_name, read_grid
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.sampling import ready_to_sample, refining, sampled_as_now
from personalize_core.workspace import commands
from personalize_core.workspace.external_columns import registered
from personalize_core.workspace.lineage.records import files_trained_on
from personalize_core.workspace.recipes import content_trained_on, device_of, load_base, split_of, workers_of
from personalize_core.workspace.stamps.made import artifact_stamp, grid_stamp, manifest_stamp, score_table_stamp
from personalize_core.workspace.stamps.sources import ENCODERS, NAMING, SAMPLING
from personalize_core.workspace.store import SCORES, Store

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from personalize_core.analyses.inputs import Grid, ImageInputs, Inputs
    from personalize_core.base_model.model import BaseModel
    from personalize_core.methods.interface import Method
    from personalize_core.metrics.encoders import TextImageEncoder

# Of these files, those that need nothing but images.
OF_IMAGES = ("per_prompt", "per_kind", "absence", "copying", "diversity")
ALL = (  # files of analyses/, in the order in which they are shown
    *OF_IMAGES,
    "drift",
    "embedding_drift",
    "bare_placeholder",
    "context_tokens",
    "object_masks",
)
SHARED = ("class_nouns", "findings", "inputs", "learned_embedding", "shared_plots")  # files of analyses/ that these use
ANALYSING = (
    *SAMPLING,
    *(f"analyses/{name}" for name in (*ALL, *SHARED)),
    *NAMING,
    *ENCODERS,
    "concepts/masks",
    "concepts/preprocessing",
    "metrics/chunks",
    "metrics/features",
    "metrics/similarity",
    "metrics/tables",
    "report/figures",
    "sampling/grid",
    "steps/analyses",
    "training/training_log",
)
TOGETHER = "together"  # in the place of a method's name: figures of several
ANALYSES = "analyses.json"  # in a folder of analyses


def analyse(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Every analysis of one method on one concept, from its artifact, its grid and its scores.

    The base model's grid and scores of the concept are looked at where they are there; what needs them says so where
    they are not.

    Args:
        method: or the label of an external column. Of its images there are the analyses of OF_IMAGES.

    Raises:
        InputError: the method has not been trained on the concept, or its grid is not sampled as params.yaml says; an
            external column has not been scored, or its images have changed since.
    """
    if method in {label for label, _ in registered(store)}:
        return _analyse_external(store, concept, method, listener)
    from personalize_core.report import display_names

    store.params.check_method(method)
    started, params, folder = time.monotonic(), store.params, store.analyses(method, concept)
    store.concept(concept)
    variants = params.sampling_variants(method)
    artifact = artifact_stamp(store, concept, method)
    sampled = grid_stamp(store, concept, method)
    if not _sampled_as_asked(store, concept, method):
        raise InputError(
            f"the grid of {concept!r} by {method} was not sampled as params.yaml says now, so new images would not "
            f"compare with it; sample it again with `personalize evaluate {concept} -m {method}`"
        )
    beside = [
        (store.scores, score_table_stamp, method),
        (store.grid, grid_stamp, BASELINE),
        (store.scores, score_table_stamp, BASELINE),
    ]
    stamp = stamp_of(
        {
            "artifact": artifact,
            "grid": sampled,
            "beside": [
                stamp_there(store, concept, name) if (place(name, concept) / MANIFEST).is_file() else None
                for place, stamp_there, name in beside
            ],
            "variants": {name: repr(variant.sampling) for name, variant in variants.items()},
            "concept_images": concept_files.content(store.concept_folder(concept)),
            "masks": own_content(store.concept_folder(concept)),
            **({"held_out": list(split_of(store, concept).held_out)} if params.held_out else {}),
            "encoders": [weights_of(name) for name in _encoder_names(store)],
            "sampling": params.sampling.how(),
            "precision": params.precision,
            "seed": store.sampling_seed,
            "names": display_names.of([method, BASELINE]),
            "sources": sources_hash([*ANALYSING, method_source(method)]),
            **refining(store, concept, method, variants, listener),
        }
    )
    with store.alone("analyses", method, concept):
        if not (skipped := is_up_to_date(folder, stamp)):
            with whole_folder(folder, stamp) as new, store.device():
                inputs = _inputs(store, concept, method, listener)
                about = {"base_model": inputs.base.name, "seed": store.sampling_seed}
                _write(new, inputs, ALL, about, listener)
    return _report(folder, stamp, skipped, started)


def _analyse_external(store: Store, concept: str, label: str, listener: Listener) -> Report:
    """The analyses of OF_IMAGES of an external column's images."""
    from personalize_core.report import display_names

    started, folder, described = time.monotonic(), store.analyses(label, concept), store.concept(concept)
    made = [grid_stamp(store, concept, label), score_table_stamp(store, concept, label)]
    baseline = store.grid(BASELINE, concept) if _sampled_as_asked(store, concept, BASELINE) else None
    stamp = stamp_of(
        {
            "images_and_scores": made,
            "baseline": grid_stamp(store, concept, BASELINE) if baseline else None,
            "concept_images": concept_files.content(store.concept_folder(concept)),
            **({"held_out": list(split_of(store, concept).held_out)} if store.params.held_out else {}),
            "encoders": [weights_of(name) for name in _encoder_names(store)],
            "names": display_names.of([label, BASELINE]),
            "sources": sources_hash(ANALYSING),
        }
    )
    with store.alone("analyses", label, concept):
        if not (skipped := is_up_to_date(folder, stamp)):
            from personalize_core.analyses.inputs import ImageInputs
            from personalize_core.metrics import tables

            with whole_folder(folder, stamp) as new, store.device():
                scores = tables.read(store.scores(label, concept) / SCORES)
                grid = _external_grid(store, label, concept, scores)
                inputs = ImageInputs(
                    method=label,
                    concept=described,
                    grid=grid,
                    baseline=_grid(baseline) if baseline else None,
                    scores=scores,
                    baseline_scores=None,
                    made_elsewhere=True,
                    **_of_concept(store, concept),
                )
                _write(new, inputs, OF_IMAGES, {}, listener)
    return _report(folder, stamp, skipped, started)


def _write(
    folder: Path, inputs: ImageInputs, names: Sequence[str], about: Mapping[str, Any], listener: Listener
) -> None:
    """What each of these analyses finds, or why it is not defined here."""
    from personalize_core.analyses.findings import Findings, NotDefined

    concept, method, found = inputs.concept.name, inputs.method, {}
    for done, name in enumerate(names):
        listener(Event(f"analysing {concept}, {method}", done, len(names)))
        analysis: Any = importlib.import_module(f"personalize_core.analyses.{name}")
        findings = Findings(folder, analysis.TITLE, analysis.HOW)
        try:
            analysis.analyse(inputs, findings)
            found[name] = findings.described()
        except NotDefined as reason:
            found[name] = findings.not_defined(str(reason))
    listener(Event(f"analysing {concept}, {method}", len(names), len(names)))
    encoders = {"identity": inputs.identity.name, "text_image": inputs.text_image.name}
    cell = {"concept": concept, "method": method, **about, "encoders": encoders}
    write_json(folder / ANALYSES, cell | {"order": list(names), "analyses": found})


def analyse_together(store: Store, concept: str, methods: Sequence[str]) -> Report:
    """What the analyses of several methods on one concept found about their embeddings, in one figure each.

    As CoRe's figures 2 and 8 show them, and AttnDreamBooth's comparison of drifts. Methods without an embedding of
    their own stand in the first alone.

    Raises:
        InputError: one of them has not been analysed.
    """
    import polars as pl

    from personalize_core.analyses import context_tokens, embedding_drift
    from personalize_core.analyses.findings import Findings
    from personalize_core.metrics import parquet

    started, described, folder = time.monotonic(), store.concept(concept), store.analyses(TOGETHER, concept)
    folders = {method: store.analyses(method, concept) for method in sorted(methods)}
    sources = {
        method: manifest_stamp(
            place,
            f"{method} has not been analysed on {concept!r}",
            f"run `{commands.analyses(store, concept, method)}`",
        )
        for method, place in folders.items()
    }
    stamp = stamp_of({"analyses": sources, "sources": sources_hash(ANALYSING)})
    with store.alone("analyses", TOGETHER, concept):
        if not (skipped := is_up_to_date(folder, stamp)):
            with whole_folder(folder, stamp) as new:
                found = {}
                findings = Findings(new, context_tokens.TITLE, context_tokens.HOW)
                paths = [place / "context_tokens.parquet" for place in folders.values()]
                if words := [parquet.read_parquet(path) for path in paths if path.is_file()]:
                    joined = pl.concat(words).unique(["filler", "kind", "word"], keep="first", maintain_order=True)
                    order = pl.col("kind").replace_strict({kind: n for n, kind in enumerate(context_tokens.KINDS)})
                    joined = joined.sort(order, maintain_order=True)
                    caption = f"how the words of '{context_tokens.TEMPLATE}' change, method by method"
                    path = findings.image("context_tokens_of_all.png", caption)
                    context_tokens.plot(joined, path, described.class_noun)
                    findings.table("context_tokens.parquet", joined.to_dicts(), context_tokens.MEANINGS, caption)
                    found["context_tokens"] = findings.described()
                findings = Findings(new, embedding_drift.TITLE, embedding_drift.HOW)
                logged = {method: place / "embedding_steps.parquet" for method, place in folders.items()}
                if steps := {m: parquet.read_parquet(path).to_dicts() for m, path in logged.items() if path.is_file()}:
                    caption = "each embedding's cosine with its start and its norm, step by step"
                    path = findings.image("embedding_drift_of_all.png", caption)
                    embedding_drift.plot(steps, path, described.placeholder)
                    found["embedding_drift"] = findings.described()
                write_json(new / ANALYSES, {"concept": concept, "methods": list(folders), "analyses": found})
    return _report(folder, stamp, skipped, started)


def analysed(store: Store, concept: str) -> list[str]:
    """The methods that have been analysed on a concept.

    Raises:
        InputError: there is none.
    """
    names = [name for name in store.params.known_methods if has_this_format(store.analyses(name, concept))]
    if not names:
        raise InputError(f"no method has been analysed on {concept!r}; `personalize analyse` does it")
    return names


def suggest_class(store: Store, concept: str, nouns: str | None = None, listener: Listener = unheard) -> Report:
    """Which nouns the text-image encoder finds most like a concept's images, in class_nouns.parquet and an image.

    Args:
        nouns: where the nouns come from, as `analyses.class_nouns.nouns_of` takes it; if not given, the few that come
            with this package under the mini world's encoder, else WordNet's.

    Raises:
        InputError: there is no such list of nouns, or no WordNet on this machine.
    """
    from personalize_core.analyses import class_nouns, shared_plots
    from personalize_core.analyses.findings import Findings
    from personalize_core.analyses.inputs import opened
    from personalize_core.metrics.encoders import load_text_image_encoder

    started, described = time.monotonic(), store.concept(concept)
    encoder_name, _ = _encoder_names(store)
    nouns = nouns or (class_nouns.COMMON if encoder_name == "mini-clip" else class_nouns.WORDNET)
    choice = class_nouns.nouns_of(nouns)
    encoded = {
        "nouns": choice,
        "encoder": weights_of(encoder_name),
        "sources": sources_hash(["analyses/class_nouns", *ENCODERS]),
    }
    concept_images = store.concept_folder(concept)
    stamp = stamp_of(
        {
            **encoded,
            "class_noun": described.class_noun,
            "concept_images": concept_files.content(concept_images),
            "more_sources": sources_hash(
                ["analyses/shared_plots", "analyses/findings", "report/figures", "steps/analyses"]
            ),
        }
    )
    folder = store.analyses("class_nouns", concept)
    with store.alone("analyses", "class_nouns", concept):
        if not (skipped := is_up_to_date(folder, stamp)):
            with whole_folder(folder, stamp) as new, store.device():
                encoder = load_text_image_encoder(encoder_name, device_of(store))
                texts = _noun_matrix(store, encoder, choice, stamp_of(encoded), listener)
                seen = encoder.images(opened(concept_files.concept_images(concept_images))).numpy()
                rows = class_nouns.ranked(choice, class_nouns.scores(seen, texts), described.class_noun)
                how = f"Mean cosine of 'a photo of a NOUN' with the concept images, {encoder.name}; {len(choice)} nouns"
                findings = Findings(new, class_nouns.TITLE, how)
                findings.table("class_nouns.parquet", rows, class_nouns.MEANINGS, "every noun, the best first")
                shown = [row for row in rows if row["rank"] <= 15 or row["is_class_noun"]]
                findings.metrics = {row["noun"]: row["score"] for row in shown}
                if described.class_noun not in choice:
                    findings.absent[described.class_noun] = "the class noun is not in this list of nouns"
                caption = f"the nouns most like {concept}; orange: its class noun"
                path = findings.image("class_nouns.png", caption)
                title = f"What is {concept}?"
                shared_plots.bars(
                    {"": findings.metrics}, path, title, "mean cosine with the concept images", described.class_noun
                )
                write_json(new / ANALYSES, {"concept": concept, "analyses": {"class_nouns": findings.described()}})
    return _report(folder, stamp, skipped, started)


# -- inside ---------------------------------------------------------------------------------------------------


def _inputs(store: Store, concept: str, method: str, listener: Listener) -> Inputs:
    """Everything that analyses look at, read and loaded."""
    from personalize_core.analyses.inputs import Inputs
    from personalize_core.artifacts.saving import restore
    from personalize_core.metrics import tables
    from personalize_core.training import training_log

    params, artifact, base = store.params, store.artifact(method, concept), load_base(store)
    trained, variants = restore(artifact, base, method), params.sampling_variants(method)
    scores = [store.scores(name, concept) / SCORES for name in (method, BASELINE)]

    seed = read_json(artifact / "config.json")["seed"] or store.training_seed

    def ready(variant: str, prompts: Sequence[str]) -> Method:
        return ready_to_sample(variants[variant], store, concept, method, base, trained, prompts, listener)

    return Inputs(
        method=method,
        concept=store.concept(concept),
        base=base,
        start=_before_training(base, trained, method, seed),
        trained=trained,
        trained_on_these=files_trained_on(artifact) == content_trained_on(store, concept),
        grid=_grid(store.grid(method, concept)),
        baseline=_grid(store.grid(BASELINE, concept)) if _sampled_as_asked(store, concept, BASELINE) else None,
        scores=tables.read(scores[0]) if scores[0].is_file() else None,
        baseline_scores=tables.read(scores[1]) if scores[1].is_file() else None,
        log=training_log.read(artifact) if (artifact / training_log.LOG).is_file() else [],
        how=params.sampling,
        seed=store.sampling_seed,
        ready=ready,
        **_of_concept(store, concept),
    )


def _of_concept(store: Store, concept: str) -> dict[str, Any]:
    """Of ImageInputs, what is the same for all methods."""
    from personalize_core.metrics.encoders import load_identity_encoder, load_text_image_encoder

    (text_image, identity), device = _encoder_names(store), device_of(store)
    concept_images = concept_files.concept_images(store.concept_folder(concept))
    held_out = split_of(store, concept).held_out
    return {
        "identity": load_identity_encoder(identity, device),
        "text_image": load_text_image_encoder(text_image, device),
        "concept_images": [path for path in concept_images if path.name not in held_out],
        "held_out": [path for path in concept_images if path.name in held_out],
        "workers": workers_of(store),
    }


def _encoder_names(store: Store) -> tuple[str, str]:
    """The headline's text-image encoder and identity encoder."""
    return store.params.encoders.text_image[0], store.params.encoders.identity[0]


def _before_training(base: BaseModel, trained: Method, method: str, seed: int) -> Method:
    """The method as its training started, by the artifact's own recipe; params.yaml may say another by now."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, method_of(method), "start"))
        start = type(trained)(trained.config, base, trained.concept)
    return start.requires_grad_(False).eval().to(base.device)


def _external_grid(store: Store, label: str, concept: str, scores: pl.DataFrame) -> Grid:
    """The images that were scored: the others could not be read."""
    from personalize_core.analyses.inputs import Grid
    from personalize_core.metrics.preprocessing import in_threads

    described = read_grid(store.grid(label, concept))
    folder, read = store.root / described["external"]["folder"], set(scores["image_sha256"])
    images = [image for image in described["images"] if image["sha256"] in read]
    now = in_threads(sha256_or_none, [folder / image["file"] for image in images])
    if changed := [one["file"] for one, digest in zip(images, now, strict=True) if digest != one["sha256"]]:
        raise InputError(
            f"{folder / changed[0]} has changed since it was scored, or is gone ({len(changed)} of {len(images)}); "
            "`personalize score` scores again what has changed"
        )
    places = [(image["prompt"], image["image"]) for image in images]
    return Grid(folder, described["templates"], places, {label: [image["file"] for image in images]})


def _grid(folder: Path) -> Grid:
    from personalize_core.analyses.inputs import Grid

    described = read_grid(folder)
    templates, images = described["templates"], described["images_per_prompt"]
    places = [(prompt, image) for prompt in range(len(templates)) for image in range(images)]
    names = {variant: [image_name(variant, *place) for place in places] for variant in described["variants"]}
    return Grid(folder, templates, places, names)


def _sampled_as_asked(store: Store, concept: str, method: str) -> bool:
    """Is there a grid, sampled in all its variants as params.yaml or the protocol says now?"""
    sampled = read_record(store.grid(method, concept) / DESCRIPTION).get("variants")
    return sampled == list(store.params.sampling_variants(method)) and sampled_as_now(store, method, concept)


def _noun_matrix(
    store: Store, encoder: TextImageEncoder, nouns: Sequence[str], stamp: str, listener: Listener
) -> np.ndarray:
    """The texts' features, kept for the next concept: WordNet's nouns take minutes to encode."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from personalize_core.analyses import class_nouns
    from personalize_core.files.atomic import save_tensors

    path = store.work("nouns", f"{stamp}.safetensors")
    try:
        return load_file(path)["texts"].numpy()
    except (FileNotFoundError, SafetensorError, KeyError):
        texts = class_nouns.matrix(encoder, nouns, lambda done, total: listener(Event("encoding nouns", done, total)))
        save_tensors(path, {"texts": torch.from_numpy(texts)})
        return texts


def _report(folder: Path, stamp: str, skipped: bool, started: float) -> Report:
    found = read_result(folder / ANALYSES, analyses=dict)["analyses"]
    images = {image["caption"]: folder / image["file"] for one in found.values() for image in one.get("images", [])}
    metrics = {
        f"{name}: {number}": value for name, one in found.items() for number, value in one.get("metrics", {}).items()
    }
    return Report(stamp, skipped, time.monotonic() - started, folder, metrics, images)
