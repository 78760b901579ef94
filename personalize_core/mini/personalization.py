"""Gates of the eight concepts, through the steps that users run: DreamBooth, and the methods that learn words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from PIL import Image

from personalize_core import steps
from personalize_core.methods import BASELINE
from personalize_core.metrics import summaries, tables
from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.mini import classifier, concepts
from personalize_core.mini.names import CATEGORIES, PLACES
from personalize_core.workspace.store import SCORES, Store

METHOD = "dreambooth"
PROMPTS = [f"a photo of a {{}} {words}" for words in PLACES.values() if words]
RECIPE = {"steps": 200, "batch_size": 4, "lr": 7e-4, "prior_weight": 0.03, "class_images": 12}  # params.yaml's
PARAMS = {
    "base_model": "mini",
    "seed": 0,
    "sampling": {"sampler": "ddim", "steps": 30, "guidance": 4.0, "images_per_prompt": 2, "prompts": "places"},
    "class_images": {"sampler": "ddim", "steps": 20, "guidance": 4.0},
    "encoders": {"text_image": ["mini-clip"], "identity": ["mini-identity"]},
    "methods": {BASELINE: {}, METHOD: {"mini": RECIPE}},
    "variants": {},
}


def run(workspace: Path) -> tuple[dict[str, float], str, np.ndarray]:
    """Train, sample and score all concepts in a workspace of the gate's own; what is there already is not made again.

    Returns:
        The figures, what they were measured on, and the images, (8 * 8, h, w, 3) uint8: a row per concept, of two
        of its concept images and six images on places that it was never seen on.
    """
    names = list(concepts.DESIGNS)
    store, grids = compared(workspace, PARAMS, (BASELINE, METHOD))
    rows = gains(store, METHOD)
    figures = {f"identity above the base model's, {name}": float(rows[name]["difference"]) for name in names}
    figures["concepts whose 95 % interval lies above the base model"] = float(
        sum(rows[name]["low"] > 0 for name in names)
    )
    images = [image for name in names for image in row_of(store, name, grids[METHOD, name])]
    measured_on = f"8 concepts, {PARAMS['sampling']['images_per_prompt']} images on each of {len(PROMPTS)} places"
    return figures, f"{measured_on}; DreamBooth, 200 steps", np.stack(images)


WORDS = ("textual_inversion", "neti", "xti", "custom_diffusion", "core@without_stage_2")


def run_words(workspace: Path, network: classifier.Network, recipes: Path) -> tuple[dict[str, float], str, np.ndarray]:
    """The methods that learn a word and little else, with the recipes of a params.yaml; otherwise as `run`.

    Args:
        network: names the category of Textual Inversion's images.
    """
    methods = yaml.safe_load(recipes.read_text())["methods"]
    params = PARAMS | {"methods": methods, "sampling": PARAMS["sampling"] | {"steps": 20}}
    store, grids = compared(workspace, params, (BASELINE, *WORDS))
    figures, names = {}, list(concepts.DESIGNS)
    for method in WORDS:
        rows = gains(store, method)
        everywhere = rows[ALL_CONCEPTS]
        figures[f"{method}: identity above the base model's"] = float(everywhere["difference"])
        figures[f"{method}: low end of its 95 % interval"] = float(everywhere["low"])
        figures[f"{method}: concepts whose interval lies above"] = float(sum(rows[name]["low"] > 0 for name in names))
    sampled = {name: images_in(grids[WORDS[0], name], WORDS[0]) for name in names}
    right = [
        (classifier.verdicts(network, images)["category"] == CATEGORIES.index(concepts.category(name))).float()
        for name, images in sampled.items()
    ]
    figures[f"{WORDS[0]}: category named"] = float(torch.cat(right).mean())
    images = [image for name in names for image in row_of(store, name, grids[WORDS[0], name], WORDS[0])]
    measured_on = f"8 concepts, {PARAMS['sampling']['images_per_prompt']} images on each of {len(PROMPTS)} places"
    return figures, f"{measured_on}; 20 steps", np.stack(images)


def images_in(grid: Path, method: str) -> np.ndarray:
    """All images of a grid, (N, h, w, 3) uint8."""
    each = PARAMS["sampling"]["images_per_prompt"]
    files = [grid / steps.image_name(method, p, image) for p in range(len(PROMPTS)) for image in range(each)]
    return np.stack([np.asarray(Image.open(file, formats=("PNG",)).convert("RGB")) for file in files])


def compared(
    workspace: Path, params: dict[str, Any], methods: Sequence[str]
) -> tuple[Store, dict[tuple[str, str], Path]]:
    """All concepts by some methods: the workspace, and the folder of each (method, concept)'s grid."""
    concepts.write(workspace / "data" / "concepts")
    (workspace / "data" / "prompts").mkdir(exist_ok=True)
    (workspace / "data" / "prompts" / "places.txt").write_text("\n".join(PROMPTS) + "\n")
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    store, grids = Store(workspace), {}
    for name in concepts.DESIGNS:
        for method in methods:
            steps.train(store, name, method)
            grids[method, name] = steps.sample_grid(store, name, method).path
            steps.score(store, name, method)
        print(f"personalized {name}", flush=True)
    return store, grids


def gains(store: Store, method: str) -> dict[str, dict[str, Any]]:
    """What the method adds to the base model's identity: a row for each concept, and one for all of them."""
    files = [store.scores(m, n) / SCORES for n in concepts.DESIGNS for m in (BASELINE, method)]
    table = summaries.difference_from_baseline(tables.concatenate([tables.read(file) for file in files]))
    table = table.filter(pl.col("metric") == "dino", pl.col("variant") == method)
    return {row["concept"]: row for row in table.iter_rows(named=True)}


def row_of(store: Store, name: str, grid: Path, method: str = METHOD) -> list[np.ndarray]:
    places = [place for place, words in PLACES.items() if words]
    unseen = [number for number, place in enumerate(places) if place not in concepts.PLACES[name]]
    references = sorted(store.concept_folder(name).glob("*.png"))
    sampled = [grid / steps.image_name(method, prompt, image) for image in (0, 1) for prompt in unseen]
    files = [references[0], references[-1], *sampled[:6]]
    return [np.asarray(Image.open(file, formats=("PNG",)).convert("RGB")) for file in files]
