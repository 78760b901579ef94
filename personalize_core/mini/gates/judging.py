"""What the gates look at, and the card kept up to date after each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from personalize_core.mini import classifier, loop, name_reader, personalization
from personalize_core.mini.export import WEIGHTS, averaged
from personalize_core.mini.gates.autoencoder import autoencoder_gate
from personalize_core.mini.gates.clip import clip_gate
from personalize_core.mini.gates.identity import identity_gate
from personalize_core.mini.gates.image_sets import concept_images, reconstructed, tiled
from personalize_core.mini.gates.model_card import card, record_of, still_true, write_card
from personalize_core.mini.gates.names import composed_figures, fitted_figures
from personalize_core.mini.gates.pictures import GRID, pictures_gate
from personalize_core.mini.gates.text import text_gate
from personalize_core.mini.gates.thresholds import SEEN, Figures, passed
from personalize_core.mini.gates.unet import unet_gate
from personalize_core.mini.named import Composer, Speaker
from personalize_core.mini.sampling import sample

NAMES_GUIDANCE = 4.0  # of images of names: params.yaml's
FITTED = 12  # names that the gate fits
FITTING = {"steps": 400, "first_timestep": 700}  # params.yaml's Textual Inversion


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

    @cached_property
    def speaker(self) -> Speaker:
        """The text encoder that ships, with the names that were trained beside it and do not ship."""
        folder = loop.last(self.work, "named", "phrased")
        if not (folder / "checkpoint.safetensors").exists():
            raise SystemExit(f"{folder} holds no names: train them first, stage 'phrased' or 'named'")
        composer = averaged(Composer(), folder, "composer_average")
        return Speaker(self.model.tokenizer, self.model.text_encoder, composer)  # type: ignore[arg-type]

    @cached_property
    def reader(self) -> name_reader.Network:
        folder = self.work / name_reader.NameReader.name
        if not (folder / "checkpoint.safetensors").exists():
            raise SystemExit(f"{folder} holds no reader of names: train it first, stage {folder.name!r}")
        return averaged(name_reader.Network(), folder)  # type: ignore[return-value]

    def names(self) -> tuple[Figures, str]:
        figures, images = composed_figures(self.model, self.speaker, self.reader, NAMES_GUIDANCE, self.samples)
        tiled(images[:96], 16).save(self.work / "names.png")
        return figures, f"{self.samples} designs that training never saw; 25 steps, guidance {NAMES_GUIDANCE}"

    def fitted(self) -> tuple[Figures, str]:
        figures, images = fitted_figures(self.model, self.speaker, self.reader, NAMES_GUIDANCE, FITTED, **FITTING)
        tiled(images, 16).save(self.work / "fitted.png")
        how = f"Textual Inversion, {FITTING['steps']} steps from timestep {FITTING['first_timestep']} on"
        return figures, f"{FITTED} such designs, 4 images of each; {how}; 25 steps, guidance {NAMES_GUIDANCE}"

    def words(self) -> tuple[Figures, str]:
        self._requires_shipped_weights("words")
        figures, measured_on, images = personalization.run_words(
            self.work / "words", self.judge, Path(__file__).parents[3] / "params.yaml"
        )
        tiled(images, 8).save(self.work / "words.png")
        return figures, measured_on

    def _requires_shipped_weights(self, gate: str) -> None:
        if self.weights.resolve() != WEIGHTS.resolve():
            raise SystemExit(f"gate {gate!r} runs the steps that users run, on the weights that ship alone")

    def personalization(self) -> tuple[Figures, str]:
        self._requires_shipped_weights("personalization")
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
