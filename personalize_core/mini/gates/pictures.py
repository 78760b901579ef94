"""Whether samples show what their prompt names, for combinations that training left out."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from personalize_core.mini import classifier
from personalize_core.mini.autoencoder import scenes
from personalize_core.mini.diffusion import held_out
from personalize_core.mini.gates.thresholds import Figures
from personalize_core.mini.names import CATEGORIES, COLOURS, PLACES
from personalize_core.mini.networks import to_tensor
from personalize_core.mini.sampling import sample
from personalize_core.mini.text import ASPECTS, right


def held_out_words(count: int) -> list[tuple[str, str, str]]:
    """`count` combinations that training left out, in random order; over again where there are not so many."""
    every = itertools.product(CATEGORIES, COLOURS, [p for p in PLACES if p])
    kept = [combination for combination in every if held_out(*combination)]
    order = np.random.default_rng(11).permutation(len(kept))
    return [kept[order[n % len(kept)]] for n in range(count)]


def pictures_gate(
    model: StableDiffusionPipeline, judge: classifier.Network, guidance: float, count: int = 200
) -> tuple[Figures, str, np.ndarray]:
    combinations = held_out_words(count)
    prompts = [f"a photo of a {colour} {category} {PLACES[place]}" for category, colour, place in combinations]
    sampled = []
    for start in range(0, len(prompts), 20):
        sampled.append(
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
    images = np.concatenate(sampled)
    read = classifier.verdicts(judge, images)
    asked = {aspect: [combination[n] for combination in combinations] for n, aspect in enumerate(ASPECTS) if n < 3}
    figures = {
        f"{aspect} named": float(
            np.mean([ASPECTS[aspect][int(r)] == a for r, a in zip(read[aspect], asked[aspect], strict=False)])
        )
        for aspect in asked
    }
    renders, _, truth = scenes(np.random.default_rng(2**20 + 1), 400, plain=1, photo=1, studio=0)
    its_own = right(judge_scores(judge, renders), classifier.truths(truth))
    figures |= {f"the classifier's own {a} on renders": s for a, s in its_own.items()}
    different = len(set(combinations))
    measured_on = (
        f"{count} samples of {different} held-out combinations; the classifier's own on {len(renders)} renders"
    )
    return figures, measured_on, images


@torch.no_grad()
def judge_scores(judge: classifier.Network, images: np.ndarray) -> dict[str, Tensor]:
    return judge(to_tensor(images))


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
