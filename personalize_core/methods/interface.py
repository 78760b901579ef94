"""What a method answers, so that one loop trains all of them and one sampler draws with all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Generator, Tensor, nn

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.concepts.images import ConceptLatents, Preprocessing
from personalize_core.errors import InputError, listed

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def options(kind: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked when it is made: for a method's Config and Sampling."""
    checked: Any = validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    return checked(kind)


def refuse_idle(chosen: Any, *switches: str, off: str) -> None:
    """Raise InputError if one of these switches is set, although another leaves it nothing to do.

    A switch counts as set when it differs from its default: that it was written out cannot be seen.

    Args:
        chosen: a Config or Sampling.
        off: the other, as a person writes it.
    """
    defaults = {field.name: field.default for field in fields(chosen)}
    idle = [f"{name} = {getattr(chosen, name)!r}" for name in switches if getattr(chosen, name) != defaults[name]]
    if idle:
        one = len(idle) == 1
        raise InputError(
            f"{listed(idle)} {'does' if one else 'do'} nothing with {off}; take {'it' if one else 'them'} out"
        )


@dataclass(frozen=True)
class Batch:
    """The rows of one training step."""

    latents: Tensor  # (B, 4, h, w), scaled as the U-Net expects
    prompts: Sequence[str]  # B of them
    weight: Tensor  # (B, 1, 1, 1), or (B, 1, h, w): how much each row, or latent pixel, counts in the loss


@dataclass(frozen=True)
class Step:
    """All that one training step computed, for a penalty to look at."""

    base: BaseModel
    batch: Batch
    x_t: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    target: Tensor  # what the U-Net should have said: noise, or velocity
    prediction: Tensor  # what it said
    context: TextContext
    maps: AttentionMaps
    generator: Generator


def _no_penalty(step: Step) -> dict[str, Tensor]:
    return {}


def _nothing_after(index: int) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One phase of training: which tensors move, how fast, how long, and under which extra losses."""

    name: str
    steps: int
    batch_size: int  # images of the concept; rows of prior preservation come on top
    param_groups: list[dict[str, Any]]  # as torch.optim takes them
    penalty: Callable[[Step], dict[str, Tensor]] = _no_penalty
    after_step: Callable[[int], None] = _nothing_after
    max_gradient_norm: float = 1.0  # gradients longer than this are shortened to it; math.inf leaves all as they are
    min_timestep: int = 0  # timesteps are drawn uniformly from here to the last


@options
class NoOptions:
    """The sampling options of a method that has none."""


class Method(nn.Module):
    """One way to teach a frozen text-to-image model a concept.

    A method owns what it learns, and nothing else: its state_dict is the artifact. It is handed the base model
    and never keeps it. `self.training` tells training from sampling, as in any nn.Module. Whatever it remembers
    between steps of a stage must be a buffer, so that a run that was cut off resumes exactly.
    """

    Config: ClassVar[type]  # how it is trained; saved in the artifact
    Sampling: ClassVar[type] = NoOptions  # how it is used; chosen for each sampling run
    # Sampling options of other methods -> why this one has not got them, where there is more to say than that.
    lacks: ClassVar[Mapping[str, str]] = {"lag": "nothing that it learns acts inside the U-Net"}
    starts_as_base_model: ClassVar[bool] = True  # untrained, does it draw what the base model draws?
    preprocessing: ClassVar[Preprocessing]  # how concept images become its training images; see preprocessing_for

    def __init__(self, config: Any, base: BaseModel, concept: Concept) -> None:
        super().__init__()
        self.config, self.concept, self.sampling = config, concept, self.Sampling()
        self.place = 0  # which of the context's concepts is this method's, where images show several

    @property
    def phrase(self) -> str:
        """How this method speaks of the concept in a prompt."""
        return f"{self.concept.placeholder} {self.concept.class_noun}"

    def say(self, template: str) -> str:
        """A prompt template with the concept in its slot."""
        return template.replace(SLOT, self.phrase)

    def stages(self) -> Sequence[Stage]:
        """The phases of training, in order."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains")

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        """Training rows. By default `size` images of the concept under "a photo of a <dog7> dog"."""
        latents = images.instances(size, generator)
        return Batch(latents, [self.say("a photo of a {}")] * size, equal_shares(size))

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        """What the cross-attention layers read. By default the prompt as the base model reads it."""
        context = base.encode(prompts, self.concept)
        return lambda t: context

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        """Put hooks or weights into the base model; leaving the block takes them all out again."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """What the log says of it after each step, beside the losses. By default what its parts say of themselves."""
        parts: list[Any] = [part for part in self.children() if hasattr(part, "metrics")]
        return {name: value for part in parts for name, value in part.metrics().items()}

    def export(self, base: BaseModel, folder: Path) -> str:
        """Write what was learned into `folder` in a format that stock diffusers loads; returns how to load it.

        Raises:
            InputError: there is no such format.
        """
        raise InputError(f"there is no public format for what {type(self).__name__} learns, so it cannot be exported")

    @classmethod
    def imported(cls, config: Any, base: BaseModel, concept: Concept, path: Path) -> Method:
        """The method with what another program learned: `path` is a file or folder like those that `export` writes.

        Raises:
            InputError: it cannot be read, does not fit, or this method has no such format.
        """
        raise InputError(f"nothing can be imported for {cls.__name__}: no public format holds all that it learns")

    @classmethod
    def preprocessing_for(cls, config: Any) -> Preprocessing:
        """How concept images become its training images under this config."""
        return cls.preprocessing

    @classmethod
    def lacks_under(cls, config: Any) -> Mapping[str, str]:
        """`lacks`, as it is under this config."""
        return cls.lacks

    @classmethod
    def check(cls, config: Any, sampling: Any) -> None:
        """Raise InputError if what is trained by `config` cannot be sampled by `sampling`."""

    @classmethod
    def images_needed(cls, config: Any, sampling: Any) -> int:
        """How many concept images there must be, so that what learned it can be sampled by `sampling`."""
        return 1

    @classmethod
    def losses_read_attention(cls, config: Any) -> bool:
        """Does a loss of its training look at attention maps? Then the U-Net cannot be checkpointed beneath it."""
        return False

    @classmethod
    def text_embeddings(cls, config: Any) -> int:
        """How many input embeddings of the text encoder it holds for the concept; one can be refined for a prompt."""
        return 0

    @classmethod
    def class_images(cls, config: Any) -> int:
        """How many images of the class noun training needs beside the concept's; drawn by the base model."""
        return 0

    @classmethod
    def real_class_images(cls, config: Any) -> bool:
        """Are they concept images instead, all those of data/regularization?"""
        return False


def equal_shares(rows: int, total: float = 1.0) -> Tensor:
    """(rows, 1, 1, 1): weights of rows that share `total` equally; with total 1 their loss is the plain mean."""
    return torch.full((rows, 1, 1, 1), total / rows)
