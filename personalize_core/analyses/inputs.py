"""What the analyses of one method on one concept look at together; features are taken once, when first asked for.

Of images made elsewhere there are `ImageInputs` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image
from torch import Tensor

from personalize_core.analyses.findings import NotDefined
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.image_files import load_image
from personalize_core.methods.interface import Method
from personalize_core.metrics.encoders import Encoder, TextImageEncoder
from personalize_core.metrics.features import Encoders, Processing, Seen
from personalize_core.metrics.tables import BASELINE
from personalize_core.sampling.sampler import Sampler, initial_noise, make_sampler, step_generators
from personalize_core.sampling.some_images import images_by
from personalize_core.workspace.sampling_settings import SamplerSettings


@dataclass(frozen=True)
class Grid:
    """Images of one concept on disk, sampled here or made elsewhere."""

    folder: Path
    templates: Sequence[str]
    places: Sequence[tuple[int, int]]  # (prompt index, image index) of each image
    names: Mapping[str, Sequence[str]]  # variant -> its images' files in the folder, one for each of `places`

    @property
    def variants(self) -> list[str]:
        return list(self.names)

    def paths(self, variant: str) -> list[Path]:
        return [self.folder / name for name in self.names[variant]]

    def of_prompts(self) -> dict[int, list[int]]:
        """Prompt index -> where its images stand among `places`."""
        found: dict[int, list[int]] = {}
        for number, (prompt, _) in enumerate(self.places):
            found.setdefault(prompt, []).append(number)
        return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Images of one method or external column, of one concept."""

    method: str  # its name, METHOD@ABLATION, or the label of an external column
    concept: Concept
    identity: Encoder
    text_image: TextImageEncoder
    concept_images: Sequence[Path]  # those that were trained on
    grid: Grid
    baseline: Grid | None  # the base model's grid, if there is one: of the same prompts, unless made elsewhere
    scores: pl.DataFrame | None
    baseline_scores: pl.DataFrame | None  # of images that share prompt and noise with these
    workers: int = 1  # threads that read and encode images
    held_out: Sequence[Path] = ()  # concept images that were not trained on
    made_elsewhere: bool = False

    @property
    def is_baseline(self) -> bool:
        """Is the method the base model itself, which learned nothing?"""
        return self.method == BASELINE

    def features(self, encoder: Encoder, paths: Sequence[Path]) -> np.ndarray:
        """(N, D) float64, of images in files; by one of the two encoders of these inputs.

        Rows of length one, or of zeros where nothing is found that the encoder looks for.
        """
        key = tuple(paths)
        if key not in self._encoded:  # by both at once, so that each file is read once
            both = Encoders([self.text_image], [self.identity])
            self._encoded[key] = Seen.of(paths, self.concept.class_noun, None, both, Processing(self.workers))
        metric = "dino" if encoder is self.identity else "clip_i"
        return self._encoded[key].features[metric, encoder.name, False].double().numpy()

    def features_of(self, encoder: Encoder, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """The same, of images at hand; an array is (N, H, W, 3) uint8."""
        opened = [Image.fromarray(one) for one in images] if isinstance(images, np.ndarray) else images
        return encoder.images(opened).double().numpy()

    def identities(self, features: np.ndarray) -> np.ndarray:
        """(N,): the mean cosine of features (N, D), by the identity encoder, with the concept images."""
        return features @ self.known.mean(axis=0)

    @property
    def known(self) -> np.ndarray:
        """(R, D): the concept images' features by the identity encoder, but for those in which it finds nothing.

        Raises:
            NotDefined: none is left.
        """
        seen = self.features(self.identity, self.concept_images)
        some = seen[seen.any(axis=1)]
        if not len(some):
            raise NotDefined(f"{self.identity.name} finds no {self.identity.looks_for} in any concept image")
        return some

    @cached_property
    def _encoded(self) -> dict[tuple[Path, ...], Seen]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Inputs(ImageInputs):
    """One method that was trained here, on one concept."""

    base: BaseModel
    start: Method  # before its training
    trained: Method
    trained_on_these: bool  # are concept images and description what it was trained on, byte for byte?
    log: Sequence[Mapping[str, Any]]  # of its training; empty if there was none here
    how: SamplerSettings
    seed: int
    ready: Callable[[str, Sequence[str]], Method]  # (variant, prompts) -> the trained method, ready to sample them

    @cached_property
    def learned(self) -> tuple[np.ndarray, np.ndarray]:
        """What the text encoder reads for the placeholder before and after training, each (n, D) float64.

        Raises:
            NotDefined: the method learns no embedding.
        """
        from personalize_core.analyses.learned_embedding import both_ends

        return both_ends(self.start, self.trained, self.base)

    def sampler(self, places: Sequence[tuple[int, int]]) -> Sampler:
        """For the images at these places alone."""
        return make_sampler(
            self.how.sampler, self.base, eta=self.how.eta, generators=step_generators(self.seed, places)
        )

    def noise(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """(N, 4, h, w)."""
        return initial_noise(self.base, self.seed, places)

    def sample(self, method: Method, prompts: Sequence[str], places: Sequence[tuple[int, int]]) -> np.ndarray:
        """(N, H, W, 3) uint8: an image for each prompt; places choose the noise."""
        return images_by(method, self.base, prompts, places, self.how, self.how.steps, self.seed).numpy()


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    return [load_image(path) for path in paths]
