"""Peak memory of scoring many images: `python -m benchmarks.scoring_memory 10000`.

Images of 64 x 64 are made on the fly and scored by the mini encoders: CLIP-T, CLIP-I and DINO. It prints the peak on
the way, when all rows are there, and when the table is written.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.metrics import features, scoring, tables
from personalize_core.metrics.kept_features import KeptFeatures

CONCEPT = Concept("teapot1", "<teapot1>", "teapot")
CONCEPT_IMAGES = Path(__file__).parents[1] / "data" / "concepts" / CONCEPT.name
PER_PROMPT = 100


def make(folder: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "plain").mkdir()
    for number in range(images):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        name = f"{number // PER_PROMPT:02d}_{number % PER_PROMPT:02d}.png"
        Image.fromarray(pixels).save(folder / "plain" / name, compress_level=0)
    about = {"base_model": "mini", "concept": CONCEPT.name, "class_noun": CONCEPT.class_noun, "method": "vico"}
    templates = [f"a photo of a {{}} number {prompt}" for prompt in range(images // PER_PROMPT)]
    about |= {"variants": ["plain"], "images_per_prompt": PER_PROMPT, "templates": templates}
    (folder / "grid.json").write_text(json.dumps(about))


def peak() -> float:
    """Of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int, help=f"a multiple of {PER_PROMPT}")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = iter(range(0, options.images, 1000))

    def encoded(done: int, total: int) -> None:
        nonlocal due
        if done > due:
            print(f"{done} of {total} encoded: peak {peak():.0f} MiB", flush=True)
            due = next(steps, total)

    due = next(steps)  # images, before the next line
    encoders = features.load_encoders(["mini-clip"], ["mini-identity"], None, ["class_phrase", "slot_deleted"], "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.images)
        kept = KeptFeatures(folder / "kept")
        how = features.Processing(options.workers, kept=kept, progress=encoded)
        began, cpu = time.perf_counter(), time.process_time()
        concept_images = sorted(CONCEPT_IMAGES.glob("*.png"))
        found = scoring.score_grid(folder, folder, CONCEPT, concept_images, encoders, processing=how)
        rows = peak()
        tables.write(found.table, folder / "scores.parquet")
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        size = sum(path.stat().st_size for path in kept.folder.iterdir()) / 2**20
    print(f"{options.images} images: {seconds:.0f} s, of which the processors worked {cpu:.0f} s")
    print(f"peak with all rows {rows:.0f} MiB")
    print(f"with the table {peak():.0f} MiB; kept features on disk {size:.1f} MiB")


if __name__ == "__main__":
    main()
