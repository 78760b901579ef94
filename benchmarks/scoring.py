"""Batched scoring against loops over single images: `python benchmarks/scoring.py [--device cuda] [--processes 2]`.

All compute the same scores from the same files, with the mini encoders: CLIP-T, CLIP-I and DINO. Features of concept
images and texts are computed once. "encoder" calls our encoders with one image at a time; "script" does what a script
would do with open_clip's and transformers' own functions; "functions" computes each score separately, as functions of
an image and its text do, so that CLIP encodes an image twice. They take turns, and medians are compared. On a CPU,
process time is measured, because the machine may be busy with other work.

With `--processes 2`, tables are also distributed over processes as `personalize run` does on a CPU, and the whole
machine is compared with one loop on it, in wall-clock time. On two hyperthreads of one core, with nothing else running:
4.0 times as fast as the first loop, 3.9 as the second, 5.9 as the third; two processes do 1.9 times the work of one.

On one thread of a busy CPU: 2.8 times as fast as the first loop, 2.9 as the second, 4.4 as the third. The features of
mini-clip alone are 4.5 times as fast in a batch as one by one (5.9 on an idle thread), those of mini-identity 1.7 times
(2.2): one image is 65 tokens, enough to keep one thread busy. Of a batch's 1.7 ms per image, its multiplications take
1.3 ms at this thread's greatest measured speed (91 GFLOP/s), so even a network of nothing else would be only 2.4 times
as fast as one by one. Preprocessing takes 0.04 ms.

What was tried, with the time per image in the network alone, which is 1.68 ms otherwise: query, key and value as one
product, 1.67; only the class token in the last block, 1.47 (features equal to 4e-8); the same compiled by Inductor,
1.46 in another run; preprocessing as one array, 0.02 ms instead of 0.04. Larger and smaller batches, channels_last, a
frozen and optimised trace and the other attention did not help. None of it justifies a network of our own beside
transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from personalize_core import steps
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.image_files import load_image
from personalize_core.metrics import chunks, features, scoring
from personalize_core.metrics.encoder_names import MINI_WEIGHTS
from personalize_core.metrics.encoders import Encoder
from personalize_core.metrics.kept_features import KeptFeatures
from personalize_core.steps.processes import shared_out

ROOT = Path(__file__).parents[1]
CONCEPT = Concept("teapot1", "<teapot1>", "teapot")


def make(folder: Path, prompts: int, images: int, size: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "plain").mkdir()
    for prompt in range(prompts):
        for image in range(images):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((size, size), Image.Resampling.BICUBIC).save(
                folder / "plain" / f"{prompt:02d}_{image:02d}.png"
            )
    about: dict[str, Any] = {"base_model": "mini", "concept": CONCEPT.name, "class_noun": CONCEPT.class_noun}
    about |= {"method": "vico", "variants": ["plain"], "images_per_prompt": images}
    templates = [f"a photo of a {{}} number {prompt}" for prompt in range(prompts)]
    (folder / "grid.json").write_text(json.dumps(about | {"templates": templates}))


def png(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG",)).convert("RGB")


class OneByOne:
    """Our encoders, one image per call."""

    def __init__(self, encoders: features.Encoders) -> None:
        self.clip, self.vit = encoders.text_image[0], encoders.identity[0]

    def say(self, text: str) -> torch.Tensor:
        return self.clip.texts([text])[0]

    def see(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        image = [png(path)]
        return self.clip.images(image)[0], self.vit.images(image)[0]

    @torch.no_grad()
    def scores(self, grid: Path, concept_images: list[Path]) -> list[tuple[float, float, float]]:
        described = json.loads((grid / "grid.json").read_text())
        known = [torch.stack(some) for some in zip(*map(self.see, concept_images), strict=True)]
        found = []
        for prompt, template in enumerate(described["templates"]):
            text = self.say(template.replace("{}", described["class_noun"]))
            for image in range(described["images_per_prompt"]):
                seen, identity = self.see(grid / "plain" / f"{prompt:02d}_{image:02d}.png")
                found.append((float(seen @ text), float((known[0] @ seen).mean()), float((known[1] @ identity).mean())))
        return found


class ScoreByScore(OneByOne):
    """Our encoders, one score of one image per call."""

    @torch.no_grad()
    def scores(self, grid: Path, concept_images: list[Path]) -> list[tuple[float, float, float]]:
        described, found = json.loads((grid / "grid.json").read_text()), []
        known = [torch.stack(some) for some in zip(*map(self.see, concept_images), strict=True)]
        for prompt, template in enumerate(described["templates"]):
            for image in range(described["images_per_prompt"]):
                path, text = (
                    grid / "plain" / f"{prompt:02d}_{image:02d}.png",
                    template.replace("{}", described["class_noun"]),
                )
                of_text = float(self.clip.images([png(path)])[0] @ self.say(text))
                of_clip = float((known[0] @ self.clip.images([png(path)])[0]).mean())
                identity = float((known[1] @ self.vit.images([png(path)])[0]).mean())
                found.append((of_text, of_clip, identity))
        return found


class Script(OneByOne):
    """open_clip and transformers, one image per call."""

    def __init__(self, device: str) -> None:
        import open_clip
        from transformers import ViTImageProcessor, ViTModel

        clip, identity = MINI_WEIGHTS / "clip", MINI_WEIGHTS / "identity"
        made: Any = open_clip.create_model_and_transforms(f"local-dir:{clip}")
        self.clip, self.prepare = made[0].eval().to(device), made[2]
        self.read, self.device = open_clip.get_tokenizer(f"local-dir:{clip}"), device
        vit: Any = ViTModel.from_pretrained(
            identity, add_pooling_layer=False, use_safetensors=True, dtype=torch.float32
        )
        self.vit = vit.eval().to(device)
        self.processor = ViTImageProcessor.from_pretrained(identity)

    def say(self, text: str) -> torch.Tensor:
        return self.clip.encode_text(self.read([text]).to(self.device), normalize=True)[0].cpu()

    def see(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        image = png(path)
        seen = self.clip.encode_image(self.prepare(image)[None].to(self.device), normalize=True)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"].to(self.device)
        known = self.vit(pixel_values=pixels).last_hidden_state[:, 0]
        return seen[0].cpu(), torch.nn.functional.normalize(known, dim=1)[0].cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processes", type=int, default=1, help="also distribute many tables, as `personalize run` does"
    )
    parser.add_argument("--ways", action="store_true", help="also compare ways to score several images at once")
    options = parser.parse_args()
    concept_images = sorted((ROOT / "data" / "concepts" / CONCEPT.name).glob("*.png"))
    encoders = loaded(options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    loops = {"encoder": OneByOne(encoders), "script": Script(options.device), "functions": ScoreByScore(encoders)}
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in loops}}
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), {}
        make(folder, options.images // 10, 10, options.size)
        for turn in range(options.rounds + 1):  # the first is not counted
            began = clock()
            found = scoring.score_grid(folder, folder, CONCEPT, concept_images, encoders).table
            took = {"ours": clock() - began}
            for loop, one in loops.items():
                began = clock()
                expected[loop] = one.scores(folder, concept_images)
                took[loop] = clock() - began
            for name, seconds in took.items() if turn else ():
                times[name].append(seconds)
        if options.ways:
            compare_ways(folder, concept_images, encoders, loops["encoder"], options.rounds)
        if options.processes > 1:
            share(options, folder, concept_images, loops)
    wide = found.pivot("metric", index=["prompt_index", "image_index"], values="score")
    wide = wide.sort("prompt_index", "image_index").select("clip_t", "clip_i", "dino").to_numpy()
    ours = statistics.median(times["ours"])
    print(f"ours: {1000 * ours / options.images:.2f} ms per image of {options.size} x {options.size}")
    for loop, some in times.items():
        if loop != "ours":
            seconds, apart = statistics.median(some), np.abs(wide - np.array(expected[loop])).max(axis=0)
            ratios = [round(one / other, 2) for one, other in zip(some, times["ours"], strict=True)]
            each = f"{1000 * seconds / options.images:.2f} ms"
            print(f"{loop}: {each}, ratio {seconds / ours:.2f} {ratios}, apart by at most {apart.max():.0e}")
    for encoder in (*encoders.text_image, *encoders.identity):
        print(f"{encoder.name} alone, {alone(encoder, concept_images, options.rounds, clock)}")


def compare_ways(
    folder: Path, concept_images: list[Path], encoders: scoring.Encoders, loop: OneByOne, rounds: int
) -> None:
    """Wall-clock time of a whole table; all take turns, so that other work on the machine meets them alike."""
    cores = len(os.sched_getaffinity(0))

    def table(workers: int, kept: Path | None = None) -> Any:
        how = features.Processing(workers, kept=KeptFeatures(kept) if kept else None)
        return scoring.score_grid(folder, folder, CONCEPT, concept_images, encoders, processing=how).table

    def with_batches_of(size: int) -> Any:
        features.even_chunks = partial(chunks.even_chunks, most=size)
        try:
            return table(1)
        finally:
            features.even_chunks = chunks.even_chunks

    def kept() -> Any:
        try:
            return table(cores, folder / "kept")
        finally:
            KeptFeatures(folder / "kept").remove()

    def on_all_cores() -> Any:
        torch.set_num_threads(cores)
        try:
            return table(1)
        finally:
            torch.set_num_threads(1)

    ways: dict[str, Callable[[], Any]] = {
        "one image at a time": lambda: loop.scores(folder, concept_images),
        "chunks of 8, one thread": lambda: with_batches_of(8),
        "chunks of 32, one thread": lambda: table(1),
        "chunks of 32, reading ahead in a second thread": lambda: read_ahead(folder, concept_images, encoders),
        f"chunks of 32, torch on {cores} threads": on_all_cores,
        f"chunks of 32, {cores} threads, each with its own chunk": lambda: table(cores),
        "the same, features kept on disk": kept,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - began)
    load = os.getloadavg()[0]
    for name, some in times.items():
        ratios = [first / own for first, own in zip(times["one image at a time"], some, strict=True)]
        print(f"{name}: ratio {statistics.median(ratios):.2f} {[round(ratio, 2) for ratio in ratios]}, load {load:.1f}")


def read_ahead(folder: Path, concept_images: list[Path], encoders: scoring.Encoders) -> None:
    """One thread decodes the next chunk while this one encodes; features alone, without rows."""
    paths = sorted((folder / "plain").glob("*.png"))
    with ThreadPoolExecutor(1) as pool:
        parts = [[paths[place] for place in chunk] for chunk in chunks.even_chunks(len(paths))]
        coming = pool.submit(list, map(load_image, parts[0]))
        for following in [*parts[1:], []]:
            images, coming = coming.result(), pool.submit(list, map(load_image, following))
            for _, encoder, _ in encoders.of_images:
                encoder.images(images)
    features.Seen.of_concept_images(concept_images, CONCEPT.class_noun, encoders)


def share(options: Any, folder: Path, concept_images: list[Path], loops: dict[str, OneByOne]) -> None:
    """The whole machine compared with one loop on it, in wall-clock time."""
    seconds = shared(folder, concept_images, 10 * options.processes, options.processes)
    print(f"{options.processes} processes: {1000 * seconds / options.images:.2f} ms per image, wall clock")
    for loop, one in loops.items():
        took = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            one.scores(folder, concept_images)
            took.append(time.perf_counter() - began)
        each = statistics.median(took)
        print(f"{loop}: {1000 * each / options.images:.2f} ms, ratio {each / seconds:.2f}")


@lru_cache
def loaded(device: str) -> features.Encoders:
    if device == "cpu":
        torch.set_num_threads(1)
    return features.load_encoders(["mini-clip"], ["mini-identity"], None, ["class_phrase"], device)


def score_copy(folder: Path, concept_images: list[Path], listener: steps.Listener) -> int:
    """A whole table, as a process of `personalize run` computes it."""
    return len(scoring.score_grid(folder, folder, CONCEPT, concept_images, loaded("cpu")).table)


def shared(folder: Path, concept_images: list[Path], tables: int, processes: int) -> float:
    """Wall-clock seconds of one table among many, without starting the processes."""
    task = partial(score_copy, folder, concept_images)
    seconds = []
    for count in (tables, 3 * tables):
        began = time.perf_counter()
        assert all(done() for done in shared_out([task] * count, processes, steps.unheard))
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (2 * tables)


def alone(encoder: Encoder, paths: list[Path], rounds: int, clock: Callable[[], float]) -> str:
    """Features of the same images in one call and one by one; nothing is read or compared."""
    images = [png(path) for path in paths] * 20
    together, single = [], []
    for _ in range(rounds):
        began = clock()
        encoder.images(images)
        middle = clock()
        for image in images:
            encoder.images([image])
        together.append(middle - began)
        single.append(clock() - middle)
    one, other = (1000 * statistics.median(some) / len(images) for some in (together, single))
    return f"features of an image: {one:.2f} ms together, {other:.2f} ms one by one, ratio {other / one:.2f}"


if __name__ == "__main__":
    main()
