"""A workspace whose grids are plain colours, and answers that nobody gave: enough to show, hand in and count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from personalize_core.concepts import concept_files
from personalize_core.study.design import Key
from personalize_core.workspace.store import Store
from tests import tiny_workspace

CONCEPTS = {"rex": "dog", "cup": "red mug"}
VARIANTS = ("personalized_residuals", "dreambooth", "textual_inversion")
TEMPLATES = [
    "a photo of a {}",
    "a {} on the beach",
    "a <b>bold</b> {} & more",
    "a {} </script><script>alert(1)</script>",
]
IMAGES = 3  # per prompt: 24 cells in all
SIZE = 24


def make(root: Path) -> Store:
    """Three methods have grids of two concepts."""
    root.mkdir(exist_ok=True)
    store = tiny_workspace.write_params(root, tiny_workspace.params(root))
    for number, (name, class_noun) in enumerate(CONCEPTS.items()):
        tiny_workspace.paint_concept_images(root / "photos" / name, count=5, seed=number)
        concept_files.add_concept(store.concepts, root / "photos" / name, class_noun)
        for variant in VARIANTS:
            sample_grid(store, name, variant)
    return store


def sample_grid(store: Store, concept: str, variant: str, **changes: Any) -> Path:
    """A grid in which every image is a colour of its own, in a file that carries the variant's name."""
    folder = store.grid(variant, concept)
    (folder / variant).mkdir(parents=True, exist_ok=True)
    about = {
        "concept": concept,
        "class_noun": CONCEPTS[concept],
        "method": variant,
        "base_model": "tiny",
        "templates": TEMPLATES,
        "images_per_prompt": IMAGES,
        "variants": [variant],
        "sampling": {"sampler": "ddim"},
        "seed": 5,
    }
    (folder / "grid.json").write_text(json.dumps(about | changes))
    secret = PngImagePlugin.PngInfo()
    secret.add_text("method", variant)
    for prompt in range(len(TEMPLATES)):
        for image in range(IMAGES):
            path = folder / variant / f"{prompt:02d}_{image:02d}.png"
            Image.fromarray(pixels_of(variant, concept, prompt, image)).save(path, pnginfo=secret)
    return folder


def pixels_of(variant: str, concept: str, prompt: int, image: int) -> np.ndarray:
    """(SIZE, SIZE, 3): noise of its own over a colour of its own."""
    place = [VARIANTS.index(variant), list(CONCEPTS).index(concept), prompt, image]
    generator = np.random.default_rng(place)
    colour = generator.integers(40, 216, size=3)
    return np.clip(colour + generator.integers(-20, 21, size=(SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def answers(key: Key, rater: str, given: list[tuple[str, int, bool, str]], **changes: Any) -> dict[str, Any]:
    """A file of answers; given: (question, pair, is the first variant on the left?, answer)."""
    pairs = key.pairs()
    rows = []
    for question, pair, first_left, answer in given:
        left, right = pairs[pair] if first_left else reversed(pairs[pair])
        rows.append(
            {"question": question, "pair": pair, "left": left, "right": right, "answer": answer, "seconds": 2.5}
        )
    whole = {
        "format": "personalize study answers 1",
        "study": key.study,
        "rater": rater,
        "name": "",
        "automated": False,
        "questions": key.questions_per_rater,
        "started": "2026-11-21T18:00:00.000Z",
        "saved": "2026-11-21T18:10:00.000Z",
        "answers": rows,
    }
    return whole | changes
