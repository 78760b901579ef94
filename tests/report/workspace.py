"""A workspace in which nothing was sampled or trained: images of noise, scores that we choose, a short log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import whole_folder, write_json
from personalize_core.files.stamps import sha256
from personalize_core.metrics import tables
from personalize_core.workspace.store import REFERENCES, SCORES, Store

ROOT = Path(__file__).parents[2]
CONCEPTS = {"rex": "dog", "cup": "red mug"}
PROMPTS = ["a photo of a {}", "a <b >{}</b > in the snow & ice", "a painting of a {}", "a {} on the beach"]
IMAGES = 2
LEVELS = {  # variant -> mean identity, mean text alignment; dreambooth is surely the most like the concept
    "base_model": (0.20, 0.310),
    "textual_inversion": (0.40, 0.305),
    "dreambooth": (0.70, 0.300),
}
SAMPLING = {"sampler": "ddim", "steps": 2, "guidance": 3.0, "images_per_prompt": IMAGES}


def make(root: Path, levels: dict[str, tuple[float, float]] | None = None, base_model: str = "mini") -> Store:
    """Scored, and not compared yet."""
    root.mkdir(parents=True, exist_ok=True)
    levels = levels or LEVELS
    params: dict[str, Any] = {
        "base_model": base_model,
        "seed": 5,
        "sampling": {**SAMPLING, "prompts": "some"},
        "class_images": {"sampler": "ddim", "steps": 2, "guidance": 3.0},
        "encoders": yaml.safe_load((ROOT / "params.yaml").read_text())["encoders"],
        "methods": {method: {} for method in [*levels, "oft"] if "@" not in method},  # oft was never sampled
        "variants": {},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "data" / "prompts").mkdir(parents=True)
    (root / "data" / "prompts" / "some.txt").write_text("\n".join(PROMPTS) + "\n")
    store = Store(root)
    for number, (concept, class_noun) in enumerate(CONCEPTS.items()):
        concept_images = root / "concept_images" / concept
        concept_images.mkdir(parents=True)
        for index in range(3):
            noise_image([number, index], (32, 24)).save(concept_images / f"{index}.png")
        concept_files.add_concept(store.concepts, concept_images, class_noun)
        for method in levels:
            artifact(store, method, concept)
            grid(store, method, concept, base_model, levels[method])
        references(store, concept)
    return store


def noise_image(seed: list[int], size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def artifact(store: Store, method: str, concept: str) -> None:
    with whole_folder(store.artifact(method, concept), f"{method} of {concept}") as folder:
        options = {} if method == "base_model" else {"steps": 40, "batch_size": 2}
        write_json(folder / "config.json", {"method": method, "config": options, "parameters": 12345})
        (folder / "weights.safetensors").write_bytes(b"0" * 4321)
        rows = [{"stage": "all", "step": i, "diffusion": 0.3 + 0.1 / (i + 1), "lr": 1e-3} for i in range(40)]
        log = "" if method == "base_model" else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "train_log.jsonl").write_text(log)
        fixed = {"before": 0.2, "after": 0.15, "fell_by": 0.05, "interval_95": [0.03, 0.07], "rows": 30}
        write_json(folder / "fixed_batch.json", fixed)


def grid(store: Store, method: str, concept: str, base_model: str, level: tuple[float, float]) -> None:
    """Images, and scores around their level: prompts differ, and variants share what a cell adds."""
    about = {
        "concept": concept,
        "class_noun": CONCEPTS[concept],
        "method": method,
        "base_model": base_model,
        "templates": PROMPTS,
        "images_per_prompt": IMAGES,
        "variants": [method],
        "sampling": SAMPLING,
        "seed": 5,
    }
    places = [(prompt, image) for prompt in range(len(PROMPTS)) for image in range(IMAGES)]
    stamp = f"grid of {method} and {concept}"
    with whole_folder(store.grid(method, concept), stamp) as folder:
        (folder / method).mkdir()
        for place in places:
            seed = [len(method), list(CONCEPTS).index(concept), *place]
            noise_image(seed, (24, 24)).save(folder / method / f"{place[0]:02d}_{place[1]:02d}.png")
        write_json(folder / "grid.json", about)
    rows = []
    for prompt, image in places:
        shared = np.random.default_rng([list(CONCEPTS).index(concept), prompt, image]).normal(0, 0.02, 3)
        own = np.random.default_rng([len(method), list(CONCEPTS).index(concept), prompt, image]).normal(0, 0.01, 3)
        identity, text = level
        path = store.grid(method, concept) / method / f"{prompt:02d}_{image:02d}.png"
        place = {
            "base_model": base_model,
            "concept": concept,
            "method": method,
            "variant": method,
            "prompt_index": prompt,
            "prompt": PROMPTS[prompt],
            "image_index": image,
        }
        values = {"dino": identity, "clip_i": identity, "clip_t": text} | {"clip_t_scaled": 2.5 * text}
        noise = dict(zip(values, [*(shared + own), 0.0], strict=True))
        for metric, value in values.items():
            said = PROMPTS[prompt].replace("{}", CONCEPTS[concept]) if metric.startswith("clip_t") else None
            rows.append(place | row(store, path, metric, value + noise[metric]) | {"text": said})
    scores(store, method, concept, rows)


def references(store: Store, concept: str) -> None:
    rows = []
    for index, path in enumerate(concept_files.concept_images(store.concept_folder(concept))):
        place = {"concept": concept, "method": REFERENCES, "variant": REFERENCES, "image_index": index}
        rows += [place | row(store, path, metric, 0.9 + 0.01 * index) for metric in ("clip_i", "dino")]
    scores(store, REFERENCES, concept, rows)


def row(store: Store, path: Path, metric: str, score: float) -> dict[str, Any]:
    encoder = "mini-identity" if metric == "dino" else "mini-clip"
    told = {
        "image": path.relative_to(store.root).as_posix(),
        "image_sha256": sha256(path),
        "metric": metric,
        "encoder": encoder,
        "encoder_sha256": ("d" if metric == "dino" else "c") * 64,
        "preprocessing": "shorter side to 64, bicubic",
        "score": score,
        "headline": True,
        "pairs": 3,
    }
    return {name: value for name, value in told.items() if name in tables.COLUMNS}


def scores(store: Store, method: str, concept: str, rows: list[dict[str, Any]]) -> None:
    with whole_folder(store.scores(method, concept), f"scores of {method} and {concept}") as folder:
        tables.write(tables.from_rows(rows), folder / SCORES)
        write_json(folder / "absent.json", [])


def analysed(store: Store, method: str, concept: str) -> None:
    """What `personalize analyse` and `heat-maps` leave behind, in small."""
    about = {
        "title": "How far the embedding moved",
        "how": "Cosine with where it started.",
        "metrics": {"cosine": 0.25},
        "absent": {"nearest_words": "the vocabulary is not there."},
        "images": [{"file": "drift.png", "caption": "The cosine while it learned"}],
        "tables": [],
    }
    other = {"title": "The bare placeholder", "how": "By the base model.", "not_defined": "no embedding is learned."}
    found = {"order": ["embedding_drift", "bare"], "analyses": {"bare": other, "embedding_drift": about}}
    with whole_folder(store.analyses(method, concept), "analysed") as folder:
        write_json(folder / "analyses.json", found)
        noise_image([1, 2], (200, 100)).save(folder / "drift.png")
    with whole_folder(store.samples(method, concept, "0123456789abcdef"), "0123456789abcdef") as folder:
        write_json(folder / "heat_maps.json", {"prompt": f"a photo of <{concept}>"})
        noise_image([3, 4], (300, 80)).save(folder / "heat_maps.png")
