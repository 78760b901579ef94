"""Judge the exported weights: `python -m personalize_core.mini.gates`. Writes the model card beside them.

Gates 1 to 5 are measured here; that a person recognises the pictures, and gate 6 (personalization), take an eye.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from personalize_core.mini import classifier, clip, concepts, loop, world
from personalize_core.mini.autoencoder import psnr, scenes
from personalize_core.mini.diffusion import encoded, held_out, judged_scenes, swap_table
from personalize_core.mini.export import WEIGHTS, averaged, size_of
from personalize_core.mini.names import CATEGORIES, COLOURS, DESIGNS, MARKS, PLACES
from personalize_core.mini.networks import to_pictures, to_tensor
from personalize_core.mini.sampling import sample
from personalize_core.mini.text import ASPECTS, Heads, at_end, labels, reading_loss, right, tokens

Figures = dict[str, float]


def reconstructed(vae, pictures: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [vae(to_tensor(pictures[n : n + 32])).sample for n in range(0, len(pictures), 32)]
    return to_pictures(torch.cat(parts))


def photographs() -> np.ndarray:
    """Every photograph of the eight concepts, (N, 64, 64, 3)."""
    drawn = [
        world.draw(concepts.scene(name, place, number))[0]
        for name in concepts.DESIGNS
        for number, place in enumerate(concepts.PLACES[name])
    ]
    return np.stack(drawn)


def autoencoder_gate(vae, judge: classifier.Network) -> Figures:
    rng = np.random.default_rng(2**20)
    pictures, _, _ = scenes(rng, 200)
    figures = {
        "dB on 200 fresh scenes": float(psnr(pictures, reconstructed(vae, pictures)).mean()),
        "dB on the concepts": float(psnr(photographs(), reconstructed(vae, photographs())).mean()),
    }
    pictures, _, drawn = scenes(rng, 400, plain=1, photo=1)
    truth = classifier.truths(drawn)
    for kind, shown in (("originals", pictures), ("reconstructions", reconstructed(vae, pictures))):
        read = classifier.verdicts(judge, shown)
        for aspect in ("category", "colour"):
            figures[f"{aspect} read from {kind}"] = float((read[aspect] == truth[aspect]).float().mean())
    return figures


def text_gate(text_encoder, words) -> Figures:
    """A linear reading fitted on 1,500 captions, tested on 500 others."""
    rng = np.random.default_rng(2**20)
    drawn = [world.random_scene(rng) for _ in range(2000)]
    captions = [world.caption(s, rng) for s in drawn]
    rows = []
    with torch.no_grad():
        for start in range(0, 2000, 100):
            ids = tokens(words, captions[start : start + 100], 24)
            rows.append(at_end(text_encoder(ids).last_hidden_state, ids, words.eos_token_id))
    features, truth = torch.cat(rows), labels(drawn, captions)
    torch.manual_seed(0)
    heads = Heads(features.shape[1])
    optimizer = torch.optim.AdamW(heads.parameters(), 0.02)
    for _ in range(300):
        loss = reading_loss(heads(features[:1500]), {a: t[:1500] for a, t in truth.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return right(heads(features[1500:]), {a: t[1500:] for a, t in truth.items()})


def unet_gate(model: StableDiffusionPipeline, count: int = 300) -> Figures:
    drawn = judged_scenes(count)
    table = swap_table(model.tokenizer, model.text_encoder, model.unet, drawn, encoded(model.vae, drawn))
    return {f"{aspect}: {figure}": value for aspect, row in table.items() for figure, value in row.items()}


def held_out_words(count: int) -> list[tuple[str, str, str]]:
    every = itertools.product(CATEGORIES, COLOURS, [p for p in PLACES if p])
    kept = [combination for combination in every if held_out(*combination)]
    order = np.random.default_rng(11).permutation(len(kept))
    return [kept[n] for n in order[:count]]


def pictures_gate(
    model: StableDiffusionPipeline, judge: classifier.Network, guidance: float, count: int = 200
) -> tuple[Figures, np.ndarray, list[str]]:
    combinations = held_out_words(count)
    prompts = [f"a photo of a {colour} {category} {PLACES[place]}" for category, colour, place in combinations]
    drawn = []
    for start in range(0, len(prompts), 20):
        drawn.append(
            sample(
                model.vae,
                model.tokenizer,
                model.text_encoder,
                model.unet,
                prompts[start : start + 20],
                guidance=guidance,
                seed=start,
            )
        )
    pictures = np.concatenate(drawn)
    read = classifier.verdicts(judge, pictures)
    asked = {aspect: [combination[n] for combination in combinations] for n, aspect in enumerate(ASPECTS) if n < 3}
    figures = {
        f"{aspect} named": float(
            np.mean([ASPECTS[aspect][int(r)] == a for r, a in zip(read[aspect], asked[aspect], strict=False)])
        )
        for aspect in asked
    }
    renders, _, truth = scenes(np.random.default_rng(2**20 + 1), 400, plain=1, photo=1, studio=0)
    own = right(judge_scores(judge, renders), classifier.truths(truth))
    return figures | {f"the classifier's own {a} on renders": s for a, s in own.items()}, pictures, prompts


@torch.no_grad()
def judge_scores(judge: classifier.Network, pictures: np.ndarray) -> dict[str, Tensor]:
    return judge(to_tensor(pictures))


def look_alikes(count: int = 50) -> list[world.Design]:
    """Other designs on the concepts' own sprites, in other colours and, half of them, with another mark."""
    rng, found = np.random.default_rng(2**20), []
    every = list(concepts.DESIGNS.values())
    for number in range(count):
        original = every[number % len(every)]
        other = world.random_design(rng, original.sprite, plain=0)
        if number % 2:
            other = replace(other, mark=original.mark, mark_colour=original.mark_colour, layout=original.layout)
        else:
            other = replace(other, mark=str(rng.choice(MARKS)), layout=str(rng.choice(DESIGNS[1:])))
        found.append(other)
    return found


def identity_gate(folder: Path, vae) -> Figures:
    """Fresh renders of the concepts; the nearest of all photographs and look-alikes must show the same concept."""
    from transformers import ViTModel

    network = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()

    @torch.no_grad()
    def features(pictures: np.ndarray) -> Tensor:
        return F.normalize(network(to_tensor(pictures)).last_hidden_state[:, 0], dim=1)

    names = list(concepts.DESIGNS)
    owners = [names.index(name) for name in names for _ in concepts.PLACES[name]]
    rng = np.random.default_rng(2**20 + 2)
    others = look_alikes()
    alike = [
        world.Scene(
            "bear", design, str(rng.choice(list(PLACES))), "photo", world.random_pose(rng), int(rng.integers(2**31))
        )
        for design in others
        for _ in range(2)
    ]
    gallery = np.concatenate([photographs(), np.stack([world.draw(s)[0] for s in alike])])
    owners += [-1] * len(alike)
    places = list(PLACES)
    asked = [
        (n, world.draw(concepts.scene(name, places[k % 11], 100 + k))[0])
        for n, name in enumerate(names)
        for k in range(12)
    ]
    truth, queries = torch.tensor([n for n, _ in asked]), np.stack([picture for _, picture in asked])
    known = features(gallery)
    figures = {}
    for kind, shown in (("renders", queries), ("reconstructed renders", reconstructed(vae, queries))):
        nearest = (features(shown) @ known.T).argmax(1)
        figures[f"nearest is the same concept, {kind}"] = float((torch.tensor(owners)[nearest] == truth).float().mean())
    similarity = features(queries) @ known.T
    own = torch.tensor(owners)[None] == truth[:, None]
    figures["mean similarity to the same concept"] = float(similarity[own].mean())
    figures["mean similarity to look-alikes"] = float(similarity[:, torch.tensor(owners) == -1].mean())
    return figures


def clip_gate(folder: Path) -> Figures:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}").tokenizer
    pictures, _, drawn = scenes(np.random.default_rng(2**20), 400, plain=1, photo=1, studio=0)
    return {f"zero-shot {a}": s for a, s in clip.accuracy(model, words, drawn, pictures).items()}


NEEDED: dict[str, dict[str, float]] = {
    "autoencoder": {"dB on 200 fresh scenes": 28, "dB on the concepts": 28},
    "text": {"category": 0.99, "colour": 0.99, "place": 0.99, "style": 0.99},
    "unet": {"place: wins": 0.90, "category: wins": 0.85, "colour: wins": 0.80},
    "pictures": {"category named": 0.80, "place named": 0.90, "colour named": 0.75},
    "clip": {"zero-shot category": 0.90, "zero-shot place": 0.95},
    "identity": {
        "nearest is the same concept, renders": 0.95,
        "nearest is the same concept, reconstructed renders": 0.95,
    },
}


def passed(gate: str, figures: Figures) -> bool:
    enough = all(figures[name] >= least for name, least in NEEDED[gate].items())
    if gate == "autoencoder":
        lost = [
            figures[f"{a} read from originals"] - figures[f"{a} read from reconstructions"]
            for a in ("category", "colour")
        ]
        return enough and max(lost) <= 0.03
    return enough


GRID = [
    f"a photo of a {colour} {category} {PLACES[place]}".strip()
    for category, colour, place in (
        *zip(CATEGORIES, [*COLOURS] * 2, [p for p in PLACES if p] * 2, strict=False),
        ("dog", "white", "beach"),
        ("cat", "pink", "desert"),
        ("car", "red", "snow"),
        ("robot", "blue", "kitchen"),
        ("mug", "yellow", "night"),
        ("teapot", "green", "meadow"),
        ("clock", "purple", "city"),
        ("shoe", "black", ""),
    )
]


def tiled(pictures: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    rows = [np.concatenate(list(pictures[n : n + columns]), 1) for n in range(0, len(pictures), columns)]
    grid = Image.fromarray(np.concatenate(rows))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def card(work: Path, weights: Path, gates: dict[str, Figures], guidance: float) -> dict:
    stages = {}
    for folder in sorted(work.iterdir()):
        if (folder / "checkpoint.safetensors").exists():
            progress = loop.read_progress(folder)
            stages[folder.name] = {
                "steps": progress.step,
                "samples seen": progress.samples,
                "minutes": round(progress.seconds / 60, 1),
                "device": progress.device,
            }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "data": "scenes drawn by personalize_core.mini.world, 64 x 64 pixels; no photograph, no download",
        "machine": f"{platform.machine()}, CPU, one or two threads",
        "bytes": size_of(weights),
        "stages": stages,
        "gates": {
            name: {"passed": passed(name, figures), "figures": {k: round(v, 5) for k, v in figures.items()}}
            for name, figures in gates.items()
        },
        "guidance of the samples": guidance,
        "prompts of the grid": GRID,
    }


def as_markdown(facts: dict) -> str:
    lines = [
        "# The embedded miniature",
        "",
        f"Written by the run on {facts['date']}. {facts['data'].capitalize()}.",
        "",
    ]
    lines += [f"All weights together: {facts['bytes']:,} bytes, fp16. Trained on {facts['machine']}.", ""]
    lines += ["| stage | steps | samples seen | minutes |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {s['steps']:,} | {s['samples seen']:,} | {s['minutes']} |" for n, s in facts["stages"].items()]
    lines += ["", "| gate | figure | measured | needed |", "| --- | --- | --- | --- |"]
    for name, gate in facts["gates"].items():
        for figure, value in gate["figures"].items():
            needed = NEEDED[name].get(figure, "")
            lines.append(
                f"| {name} ({'passed' if gate['passed'] else 'not passed'}) | {figure} | {value:.4g} | {needed} |"
            )
    lines += ["", "![24 prompts](samples.png)", "", "Row by row:", ""]
    return "\n".join([*lines, *(f"{n}. {prompt}" for n, prompt in enumerate(facts["prompts of the grid"], 1))]) + "\n"


def judged(work: Path, weights: Path, guidance: float = 3.0, count: int = 200) -> dict:
    judge = averaged(classifier.Network(), work / "classifier")
    model = StableDiffusionPipeline.from_pretrained(weights / "base", torch_dtype=torch.float32)
    gates: dict[str, Figures] = {}

    def report(name: str, figures: Figures) -> None:
        gates[name] = figures
        print(f"{'passed    ' if passed(name, figures) else 'NOT passed'} {name}: ", end="")
        print(", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)

    report("autoencoder", autoencoder_gate(model.vae, judge))  # type: ignore[arg-type]
    report("text", text_gate(model.text_encoder, model.tokenizer))
    report("clip", clip_gate(weights / "clip"))
    report("identity", identity_gate(weights / "identity", model.vae))
    report("unet", unet_gate(model))
    figures, pictures, _ = pictures_gate(model, judge, guidance, count)  # type: ignore[arg-type]
    report("pictures", figures)
    tiled(pictures[:96], 16).save(work / "held_out.png")
    grid = sample(model.vae, model.tokenizer, model.text_encoder, model.unet, GRID, steps=40, guidance=guidance)
    tiled(grid, 8).save(weights / "samples.png", optimize=True)
    facts = card(work, weights, gates, guidance)
    (weights / "model_card.json").write_text(json.dumps(facts, indent=2) + "\n")
    (weights / "MODEL_CARD.md").write_text(as_markdown(facts))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.gates", description=__doc__)
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judged(options.work, options.weights, options.guidance, options.samples)


if __name__ == "__main__":
    main()
