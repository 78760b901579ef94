"""Gate 6: DreamBooth on each of the eight concepts, through the steps that users run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import yaml
from PIL import Image

from personalize_core import steps
from personalize_core.methods import BASELINE
from personalize_core.metrics import summaries, tables
from personalize_core.mini import concepts
from personalize_core.mini.names import PLACES
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
    concepts.write(workspace / "data" / "concepts")
    (workspace / "data" / "prompts").mkdir(exist_ok=True)
    (workspace / "data" / "prompts" / "places.txt").write_text("\n".join(PROMPTS) + "\n")
    (workspace / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    store = Store(workspace)
    names, grids = list(concepts.DESIGNS), {}
    for name in names:
        for method in (BASELINE, METHOD):
            steps.train(store, name, method)
            grids[name] = steps.sample_grid(store, name, method).path
            steps.score(store, name, method)
        print(f"personalized {name}", flush=True)
    table = tables.concatenate([tables.read(store.scores(m, n) / SCORES) for n in names for m in (BASELINE, METHOD)])
    gains = summaries.difference_from_baseline(table).filter(pl.col("metric") == "dino", pl.col("variant") == METHOD)
    rows = {row["concept"]: row for row in gains.iter_rows(named=True)}
    figures = {f"identity above the base model's, {name}": float(rows[name]["difference"]) for name in names}
    figures["concepts whose 95 % interval lies above the base model"] = float(
        sum(rows[name]["low"] > 0 for name in names)
    )
    images = [image for name in names for image in row_of(store, name, grids[name])]
    measured_on = f"8 concepts, {PARAMS['sampling']['images_per_prompt']} images on each of {len(PROMPTS)} places"
    return figures, f"{measured_on}; DreamBooth, 200 steps", np.stack(images)


def row_of(store: Store, name: str, grid: Path) -> list[np.ndarray]:
    places = [place for place, words in PLACES.items() if words]
    unseen = [number for number, place in enumerate(places) if place not in concepts.PLACES[name]]
    references = sorted(store.concept_folder(name).glob("*.png"))
    sampled = [grid / steps.image_name(METHOD, prompt, image) for image in (0, 1) for prompt in unseen]
    files = [references[0], references[-1], *sampled[:6]]
    return [np.asarray(Image.open(file, formats=("PNG",)).convert("RGB")) for file in files]
