"""What a judge is shown and asked, and what any judge can do."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from personalize_core.concepts.image_files import load_image
from personalize_core.metrics.judge import rubric


class Refused(Exception):
    """The judge does not answer this question, and may answer others; says why."""

    def __init__(self, why: str, by_model: bool = False) -> None:
        super().__init__(why)
        self.by_model = by_model  # the model's own words, so the judge is set up well


class Stopped(Exception):
    """The judge was stopped while it waited to ask again."""


@dataclass(frozen=True)
class ShownImage:
    """An image as it is sent."""

    png: bytes
    sha256: str  # of these bytes

    @classmethod
    def of(cls, path: Path, size: int) -> ShownImage:
        """The image in a file, upright, in sRGB, its longer side at most `size` pixels.

        Raises:
            InputError: it cannot be read.
        """
        image = load_image(path).convert("RGB")
        if (longer := max(image.size)) > size:
            width, height = (max(1, round(side * size / longer)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return cls(buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest())


@dataclass(frozen=True)
class Question:
    """What is asked about which images."""

    text: str
    images: Sequence[ShownImage]
    repetition: int = 0  # asked this often before

    @property
    def asks(self) -> dict[str, Any]:
        """All of it, images by their hashes."""
        images = [image.sha256 for image in self.images]
        return {"text": self.text, "images": images, "repetition": self.repetition, "rubric": rubric.VERSION}


@dataclass(frozen=True)
class Showing:
    """How a judge is shown images and asked."""

    image_size: int = 512  # pixels; the longer side, at most
    detail: str | None = "high"  # of OpenAI's image_url; None: not sent
    temperature: float | None = 0.0  # None: not sent
    repetitions: int = 1
    concept_images: int = 1  # that an image is compared with, the first ones

    def __str__(self) -> str:
        parts = [f"RGB, upright; longer side at most {self.image_size}, Lanczos; PNG"]
        parts += [f"detail {self.detail}"] if self.detail else []
        parts += [f"temperature {self.temperature:g}"] if self.temperature is not None else []
        parts += [f"rubric {rubric.VERSION}", f"mean of {self.repetitions}" if self.repetitions > 1 else "asked once"]
        first = "concept image" if self.concept_images == 1 else f"{self.concept_images} concept images"
        return "; ".join([*parts, f"beside the first {first}"])


class Judge(Protocol):
    """A model that answers questions about images. `ask` is called in several threads."""

    @property
    def name(self) -> str:
        """Of the model."""
        ...

    @property
    def weights(self) -> str:
        """What is known of its weights."""
        ...

    @property
    def answers_depend_on(self) -> Mapping[str, Any]:
        """All that its answers depend on, but for the question."""
        ...

    @property
    def tries(self) -> int:
        """How often a question is asked whose answer cannot be read; 1 where each answer would be the same."""
        ...

    @property
    def at_once(self) -> int:
        """How many questions it may be asked at the same time."""
        ...

    def ask(self, question: Question) -> str:
        """The answer, as it came.

        Raises:
            Refused: this question has no answer.
            InputError: no question has.
        """
        ...

    def stop(self) -> None:
        """Wait for nothing any more: another question has failed."""
        ...
