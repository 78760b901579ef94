"""Is what a step made fit for the next one? Each gate looks at results on disk, and says what it measured.

A gate that fails where later work would be wasted is serious: Dagster then stops the run (pipelines/assets/checks.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.artifacts.description import imported
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import read_json, read_result, read_results, write_json
from personalize_core.files.stamps import sha256, sources_hash, stamp_of
from personalize_core.methods import BASELINE
from personalize_core.sampling.grid import images_in, located, read_grid
from personalize_core.steps.latents import MOMENTS
from personalize_core.steps.scores import left_out
from personalize_core.steps.training import PROOF
from personalize_core.workspace.lineage.records import file_problems, manifest_of
from personalize_core.workspace.recipes import (
    images_trained_on,
    load_base,
    methods_with_a_recipe,
    preparations,
    split_of,
)
from personalize_core.workspace.stamps.scoring import without_identity
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.preprocessing import Preprocessing

FEW = 3  # concept images; below it methods learn the pose too, and nothing tells how alike concept images are
LEAST_PSNR = 15.0  # decibels, over pixels; Stable Diffusion's autoencoder keeps above 25, another image below 12
DIVERGED = 1.5  # times the loss before training
ROUNDING = 1e-5  # a cosine of an image with itself may be that much above 1
LEAST_SPREAD = 1.0  # grey levels; an image below it shows nothing


@dataclass(frozen=True)
class Gate:
    """What was looked at, and whether it may go on."""

    name: str
    passed: bool
    said: str  # a sentence for people
    serious: bool = True  # what follows would be wasted; else a warning
    metrics: dict[str, float] = field(default_factory=dict)


def concept_images(store: Store, concept: str) -> list[Gate]:
    """Can every concept image be read, and are they enough for all that params.yaml asks for?"""
    name = "concept_images_usable"
    try:
        described = store.concept(concept)
        concept_files.concept_images(store.concept_folder(concept))
        found = len(split_of(store, concept).trained_on)
    except InputError as error:
        return [Gate(name, False, str(error))]
    metrics = {"concept_images": float(found)}
    for method in methods_with_a_recipe(store):
        config = store.params.config(method)
        for variant in store.params.sampling_variants(method).values():
            if (needed := config.images_needed(variant.sampling)) > found:
                return [
                    Gate(name, False, f"{variant.name} takes {needed} concept images; there are {found}", True, metrics)
                ]
    if found < FEW:
        said = (
            f"there are {found} of this {described.class_noun}; every method works, and learns better from {FEW} to 6"
        )
        return [Gate(name, False, said, False, metrics)]
    return [Gate(name, True, f"all {found} can be read", True, metrics)]


def latents(store: Store, concept: str) -> list[Gate]:
    """Are all latents finite, and do they decode to their concept images? Looked at once for the same latents."""
    recipes = preparations(store)
    stamps = {key: manifest_of(store.latents(concept, key)).get("stamp") for key in recipes}
    hashes = {
        key: sha256(store.latents(concept, key) / MOMENTS) for key in recipes
    }  # a damaged file keeps its manifest
    stamp = stamp_of({"latents": stamps, "moments": hashes, "sources": sources_hash(["steps/result_checks"])})
    kept = store.work("gates", f"latents-{concept}.json")
    try:
        known = read_json(kept)
        if known["stamp"] == stamp:
            return [Gate(**gate) for gate in known["gates"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    gates = _look_at_latents(store, concept, list(recipes.values()))
    write_json(kept, {"stamp": stamp, "gates": [asdict(gate) for gate in gates]})
    return gates


def artifact(store: Store, concept: str, method: str) -> list[Gate]:
    """Did training stay finite, did it teach anything, and does the artifact on disk hold all of it?"""
    from personalize_core.training import training_log

    folder = store.artifact(method, concept)
    names = ("loss_finite", "loss_falls", "artifact_restores")
    if imported(folder):
        unknown = [Gate(name, True, "another program trained it; nothing is known of that") for name in names[:2]]
        if not (folder / PROOF).is_file():
            said = f"it was imported before imports were proved; remove {folder} and import it again"
            return [*unknown, Gate(names[2], False, said, False)]
        return [*unknown, _restores(folder, names[2])]
    rows = training_log.read(folder)
    if not rows:
        return [Gate(name, True, "this method trains nothing") for name in names]
    wrong = [(row["step"], name) for row in rows for name, value in row.items() if not _finite(value)]
    said = f"{wrong[0][1]} is not finite at step {wrong[0][0]}" if wrong else f"over all {len(rows)} steps"
    return [Gate(names[0], not wrong, said), _loss_falls(folder, names[1]), _restores(folder, names[2])]


def grid(store: Store, concept: str, method: str) -> list[Gate]:
    """Is every image there, and does every one show something?"""
    import numpy as np

    from personalize_core.concepts.image_files import load_image

    folder = store.grid(method, concept)
    names = list(images_in(read_grid(folder)))
    missing, flat = [], []
    for name in names:
        try:
            spread = float(np.asarray(load_image(folder / name)).astype(float).std())
        except (InputError, OSError):
            missing.append(name)
            continue
        if not spread >= LEAST_SPREAD:
            flat.append(name)
    metrics = {"images": float(len(names)), "missing": float(len(missing)), "constant": float(len(flat))}
    shows = f"{listed(flat[:3])} shows one colour" if flat else "every image shows something"
    there = f"{listed(missing[:3])} cannot be read" if missing else f"all {len(names)} images are there"
    return [
        Gate("grid_complete", not missing, there, True, metrics),
        Gate("grid_not_constant", not flat, shows, True, metrics),
    ]


def scores(store: Store, concept: str, method: str) -> list[Gate]:
    """Does every image have every score, or a reason why not, and is every score one that there can be?

    Args:
        method: or the label of an external column, or REFERENCES.
    """
    from personalize_core.metrics import parquet, tables

    folder = store.scores(method, concept)
    table, absent = parquet.read_parquet(folder / SCORES), read_results(folder / ABSENT)
    out = []
    for row in table.select("metric", "image", "score", "scaling").iter_rows(named=True):
        low, high = tables.RANGES[row["scaling"]]
        if not low - ROUNDING <= row["score"] <= high + ROUNDING:
            out.append(row)
    said = f"{out[0]['metric']} of {out[0]['image']} is {out[0]['score']}" if out else f"all {len(table)} scores are"
    lacking = _lacking(store, table, absent, concept, method)
    if lacking:
        lack = f"{lacking[0]} has no score and no reason; {len(lacking)} in all"
    else:
        unscored = left_out(store, concept, method)
        lack = f"every image has all{f', but for those left out: {listed(unscored, 4)}' if unscored else ''}"
    return [
        Gate("scores_in_range", not out, said, True, {"scores": float(len(table))}),
        Gate("scores_complete", not lacking, lack, True, {"absent_with_a_reason": float(len(absent))}),
    ]


def identity(store: Store, concept: str, method: str) -> list[Gate]:
    """Are the images more like the concept than those of the base model, which has never seen it?"""
    from personalize_core.metrics import parquet, tables

    name, baseline = "identity_above_base_model", store.scores(BASELINE, concept) / SCORES
    if method == BASELINE:
        return [Gate(name, True, "this is the base model", False)]
    if not baseline.is_file():
        return [Gate(name, True, "not compared: the base model has no scores of this concept yet", False)]
    found = {}
    for who, path in ((BASELINE, baseline), (method, store.scores(method, concept) / SCORES)):
        table = parquet.read_parquet(path).filter(headline=True)
        table = table.filter(metric=tables.shown("dino", set(table["metric"])))
        for (variant,), group in table.group_by("variant", maintain_order=True):
            found[who if who == BASELINE else str(variant)] = float(group["score"].to_numpy().mean())
    if BASELINE not in found or len(found) == 1:
        return [Gate(name, True, "not compared: there are no scores of identity (DINO)", False)]
    below = [variant for variant, value in found.items() if variant != BASELINE and not value > found[BASELINE]]
    said = "; ".join(f"{variant} {value:.3f}" for variant, value in found.items())
    return [Gate(name, not below, f"mean DINO: {said}", False, found)]


def comparison(store: Store) -> list[Gate]:
    """Does the comparison hold every concept and method of the experiment?"""
    missing = read_result(store.comparison() / "summary.json", missing=list)["missing"]
    said = f"without scores: {listed(missing[:5])}; {len(missing)} in all" if missing else "nothing is missing"
    return [Gate("comparison_complete", not missing, said, False, {"missing": float(len(missing))})]


# -- inside ---------------------------------------------------------------------------------------------------


def _look_at_latents(store: Store, concept: str, recipes: Sequence[Preprocessing]) -> list[Gate]:
    import torch
    from safetensors.torch import load_file

    names = ("latents_finite", "latents_decode")
    saved = {recipe.key: load_file(store.latents(concept, recipe.key) / MOMENTS) for recipe in recipes}
    wrong = [f"{key}, {name}" for key, all_ in saved.items() for name, one in all_.items() if not one.isfinite().all()]
    count = sum(len(all_) for all_ in saved.values())
    finite = Gate(names[0], not wrong, f"{wrong[0]} is not" if wrong else f"all {count} are")
    if wrong:
        return [finite, Gate(names[1], False, "not looked at, for they are not finite")]
    paths, worst, fault = images_trained_on(store, concept), math.inf, ""
    with store.device(), torch.no_grad():
        base = load_base(store)
        for recipe in recipes:
            for index, path in enumerate(paths):
                heard, ours = _decoded(base, recipe, path, saved[recipe.key].get(f"{index:03d}"))
                worst = min(worst, heard)
                if not ours:
                    fault = fault or f"{recipe.key}, {path.name}: these are not the latents of this concept image"
    metrics = {"least_psnr": worst}
    if fault:
        return [finite, Gate(names[1], False, fault, True, metrics)]
    said = f"the concept images come back with at least {worst:.1f} dB"
    if worst < LEAST_PSNR:
        said += f", and below {LEAST_PSNR:g} nobody knows them again: the base model's autoencoder cannot say them"
        return [finite, Gate(names[1], False, said, False, metrics)]
    return [finite, Gate(names[1], True, said, True, metrics)]


def _decoded(base: BaseModel, recipe: Preprocessing, path: Path, saved: Tensor | None) -> tuple[float, bool]:
    """How well the first view comes back, in dB, and whether these are what the autoencoder makes of it."""
    import torch

    from personalize_core.concepts.image_files import load_image
    from personalize_core.concepts.images import to_pixels, views_of

    view = views_of(recipe, load_image(path), base.image_size)[:1]
    fresh = base.moments(to_pixels(view))
    if saved is None or saved[:1].shape != fresh.shape:
        return -math.inf, False
    image = ((to_pixels(view) + 1) * 127.5).round().permute(0, 2, 3, 1)
    came = [_psnr(image, base.decode(moments[:, 0]).float()) for moments in (saved[:1], fresh)]
    alike = torch.allclose(saved[:1, 0], fresh[:, 0], atol=1e-2, rtol=1e-2)
    return came[0], came[0] >= LEAST_PSNR or alike


def _psnr(one: Tensor, other: Tensor) -> float:
    error = (one - other).pow(2).mean().item()
    return 10 * math.log10(255**2 / error) if error else 100.0


def _loss_falls(folder: Path, name: str) -> Gate:
    fixed = read_result(folder / "fixed_batch.json", before=float, after=float, fell_by=float, interval_95=list)
    before, after, (low, high) = fixed["before"], fixed["after"], fixed["interval_95"]
    metrics = {"before": before, "after": after, "fell_by": fixed["fell_by"]}
    said = f"{before:.4f} before training, {after:.4f} after it; fell by {fixed['fell_by']:.4f} [{low:.4f}, {high:.4f}]"
    if not _finite(after) or after > DIVERGED * before:
        return Gate(name, False, f"training has diverged: {said}", True, metrics)
    return Gate(name, low > 0, said, False, metrics)


def _restores(folder: Path, name: str) -> Gate:
    manifest = manifest_of(folder)
    if problems := file_problems(folder, manifest) if manifest else ["its manifest is gone"]:
        return Gate(name, False, f"the artifact is not as it was made: {problems[0]}")
    proof = read_result(folder / PROOF, largest_difference=float, allowed_difference=float)
    difference, allowed = proof["largest_difference"], proof["allowed_difference"]
    said = f"a fresh process sampled with it what the trainer sampled, to {difference:.3g} (at most {allowed:.3g})"
    return Gate(name, difference <= allowed, said, True, {"largest_difference": difference})


def _lacking(store: Store, table: pl.DataFrame, absent: list[dict[str, Any]], concept: str, method: str) -> list[str]:
    """Images that lack a score which others of this table have, with no reason given."""
    from personalize_core.metrics import tables

    excused = {(one["metric"], one["image"]) for one in absent}
    images: dict[str, int | None] = dict.fromkeys(table["image"].unique())  # image -> its prompt, by its place
    spared: set[int] = set()
    apart: dict[str, set[str]] = {}  # of concept images: references -> those that are compared with them
    if method == REFERENCES:
        for references, image in table.select("references", "image").unique().iter_rows():
            apart.setdefault(references, set()).add(image)
        if len(concept_files.concept_images(store.concept_folder(concept))) > 1 and not len(table) and not absent:
            return ["every concept image"]
    else:
        folder = store.grid(method, concept)
        places = located(folder, read_grid(folder), store.root)
        images = {_as_scored(store.root, image.path): image.prompt for image in places}
        spared = set(without_identity(store, concept, method))
    there = set(table.select("metric", "encoder", "image").iter_rows())
    return [
        f"{metric} of {image}"
        for metric, encoder, references in table.select("metric", "encoder", "references")
        .unique(maintain_order=True)
        .iter_rows()
        for image, prompt in images.items()
        if image in apart.get(references, images)
        and (metric, encoder, image) not in there
        and not {(metric, image), (metric, None), (None, image)} & excused
        and not (prompt in spared and not tables.MEASURES[metric].reads_text)
    ] or ([] if len(table) or absent or not images else [next(iter(images))])


def _as_scored(root: Path, path: Path) -> str:
    """How a table of scores names an image."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
