"""What the gates look at, and the card kept up to date after each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from personalize_core.mini import classifier, personalization
from personalize_core.mini.export import WEIGHTS, averaged
from personalize_core.mini.gates.autoencoder import autoencoder_gate
from personalize_core.mini.gates.clip import clip_gate
from personalize_core.mini.gates.identity import identity_gate
from personalize_core.mini.gates.image_sets import concept_images, reconstructed, tiled
from personalize_core.mini.gates.model_card import card, record_of, still_true, write_card
from personalize_core.mini.gates.pictures import GRID, pictures_gate
from personalize_core.mini.gates.text import text_gate
from personalize_core.mini.gates.thresholds import SEEN, Figures, passed
from personalize_core.mini.gates.unet import unet_gate
from personalize_core.mini.sampling import sample


@dataclass
class Judgement:
    """What the gates look at, loaded when the first of them asks."""

    work: Path
    weights: Path
    guidance: float = 6.0
    samples: int = 200

    @cached_property
    def model(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(
            self.weights / "base", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )

    @cached_property
    def judge(self) -> classifier.Network:
        folder = self.work / "classifier"
        if not (folder / "checkpoint.safetensors").exists():
            raise SystemExit(f"{folder} holds no classifier to judge with: train it first, stage 'classifier'")
        return averaged(classifier.Network(), folder)  # type: ignore[return-value]

    def autoencoder(self) -> tuple[Figures, str]:
        photos = concept_images()
        pairs = np.concatenate([photos, reconstructed(self.model.vae, photos)], axis=1)
        tiled(pairs, 10).save(self.work / "reconstructions.png")
        return autoencoder_gate(self.model.vae, self.judge)

    def text(self) -> tuple[Figures, str]:
        return text_gate(self.model.text_encoder, self.model.tokenizer)

    def clip(self) -> tuple[Figures, str]:
        return clip_gate(self.weights / "clip")

    def identity(self) -> tuple[Figures, str]:
        return identity_gate(self.weights / "identity", self.model.vae)

    def unet(self) -> tuple[Figures, str]:
        return unet_gate(self.model)

    def pictures(self) -> tuple[Figures, str]:
        figures, measured_on, images = pictures_gate(self.model, self.judge, self.guidance, self.samples)
        tiled(images[:96], 16).save(self.work / "held_out.png")
        grid = sample(
            self.model.vae,
            self.model.tokenizer,
            self.model.text_encoder,
            self.model.unet,
            GRID,
            steps=40,
            guidance=self.guidance,
        )
        tiled(grid, 8).save(self.weights / "samples.png", optimize=True)
        return figures, f"{measured_on}; 25 steps, guidance {self.guidance}; the grid 40 steps"

    def personalization(self) -> tuple[Figures, str]:
        if self.weights.resolve() != WEIGHTS.resolve():
            raise SystemExit("gate 'personalization' runs the steps that users run, on the weights that ship alone")
        figures, measured_on, images = personalization.run(self.work / "personalization")
        tiled(images, 8).save(self.weights / "personalization.png", optimize=True)
        return figures, measured_on


def judged(judgement: Judgement, asked: list[str], seen: dict[str, int] | None = None) -> dict:
    """Measure the gates asked for, add what was seen by eye, and bring the card up to date after each."""
    gates = still_true(judgement.weights)
    facts = card(judgement.work, judgement.weights, gates)
    for name in asked:
        gate: Callable[[], tuple[Figures, str]] = getattr(judgement, name)
        figures, measured_on = gate()
        gates[name] = record_of(name, figures, measured_on, judgement.weights)
        print(f"{'passed    ' if gates[name]['passed'] else 'NOT passed'} {name}: ", end="")
        print(", ".join(f"{k} {v:.4g}" for k, v in figures.items()), f"({measured_on})", flush=True)
        facts = write_card(judgement.work, judgement.weights, gates)
    for name, count in (seen or {}).items():
        if name not in gates:
            raise SystemExit(f"gate {name!r} has not been measured on these weights, so there is nothing to have seen")
        figures = gates[name]["figures"] | {SEEN[name][0]: count}
        gates[name] |= {"figures": figures, "passed": passed(name, figures)}
        facts = write_card(judgement.work, judgement.weights, gates)
    return facts
