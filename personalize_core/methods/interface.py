"""The interface of a method: one loop trains every method, and one sampler samples with every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.concepts.images import ConceptLatents, Rows
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

Attach = Callable[[BaseModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """The rows of one training step."""

    latents: Tensor  # (B, 4, h, w), scaled as the U-Net expects
    prompts: Sequence[str]  # B of them
    weight: Tensor  # (B, 1, 1, 1), or (B, 1, h, w): how much each row, or latent pixel, counts in the loss
    sizes: Tensor | None  # (B, 6): as `TextContext.sizes`; None: all are whole images

    @classmethod
    def of(cls, rows: Rows, prompts: Sequence[str], total: float = 1.0) -> Batch:
        """Rows that share `total` equally, each under its prompt."""
        return cls(rows.latents, prompts, equal_shares(len(prompts), total), rows.sizes)

    def part(self, rows: slice) -> Batch:
        sizes = None if self.sizes is None else self.sizes[rows]
        return Batch(self.latents[rows], self.prompts[rows], self.weight[rows], sizes)

    def followed_by(self, other: Batch) -> Batch:
        """These rows, and behind them those of another batch."""
        known = [sizes for sizes in (self.sizes, other.sizes) if sizes is not None]
        if len(known) == 1:
            raise ValueError("sizes are needed of the rows of both batches, or of neither")
        return Batch(
            latents=torch.cat([self.latents, other.latents]),
            prompts=[*self.prompts, *other.prompts],
            weight=torch.cat([self.weight, other.weight]),
            sizes=torch.cat(known) if known else None,
        )


@dataclass(frozen=True)
class Step:
    """All that one training step computed, for a penalty to look at; of all rows of the batch, or of some.

    A batch may be computed in parts, whose losses add up to the batch's: a penalty that sums over rows needs nothing
    for that, one that is a mean over them, or does not depend on them, counts `share`.
    """

    base: BaseModel
    batch: Batch
    x_t: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    target: Tensor  # what the U-Net should have said: noise, or velocity
    prediction: Tensor  # what it said
    context: TextContext
    maps: AttentionMaps
    generator: Generator  # in the same state for each part of a batch
    share: float = 1.0  # how many of the batch's rows these are


def _no_penalty(step: Step) -> dict[str, Tensor]:
    return {}


def _nothing_after(index: int) -> None:
    pass


def _nothing_at_end() -> None:
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
    at_end: Callable[[], None] = _nothing_at_end  # behind the last step that is taken, whichever that is
    least_steps: int = 0  # before which it does not end, however much is learned
    max_gradient_norm: float = 1.0  # gradients longer than this are shortened to it; math.inf leaves all as they are
    min_timestep: int = 0  # timesteps are drawn uniformly from here to the last
    # Losses that need a pass of their own and share no graph with the prediction, which is gone when they are computed.
    later_penalty: Callable[[Step], dict[str, Tensor]] = _no_penalty
    # What it puts into the base model, where that is less than the method's own `attach`.
    attach: Attach | None = None
    # (B,): what each of the rows at hand adds to what is minimized, in place of its part of the diffusion loss.
    objective: Callable[[Step], Tensor] | None = None
    # Makes its optimizer of `param_groups`, where the method is one: not the run's, whichever params.yaml names.
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None

    @property
    def looks_at_attention(self) -> bool:
        """May its penalty read the attention maps of a step?"""
        return self.penalty is not _no_penalty

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """All losses beside the diffusion loss, by name."""
        return {**self.penalty(step), **self.later_penalty(step)}


class Method(nn.Module):
    """One way to teach a frozen text-to-image model a concept.

    A method owns what it learns, and nothing else: its state_dict is the artifact. It is handed the base model
    and never keeps it. `self.training` tells training from sampling, as in any nn.Module. Whatever it remembers
    between steps of a stage must be a buffer, so that a run that was cut off resumes exactly.
    """

    Config: ClassVar[type[Recipe]]  # its recipe's class, which says all that can be known of it without tensors

    def __init__(self, config: Recipe, base: BaseModel, concept: Concept) -> None:
        """
        Raises:
            InputError: it is not defined on this base model.
        """
        super().__init__()
        if (why := config.needs_one_text_encoder) and len(base.text_encoders) > 1:
            raise InputError(
                f"{config.display_name} is not defined on Stable Diffusion XL: {why}; take another method, or a Stable "
                "Diffusion 1 or 2 as base_model"
            )
        self.config: Any = config
        self.concept, self.sampling = concept, config.Sampling()
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
        return Batch.of(images.instance_rows(size, generator), [self.say("a photo of a {}")] * size)

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        """What the cross-attention layers read. By default the prompt as the base model reads it."""
        context = base.encode(prompts, self.concept)
        return lambda t: context

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        """Put hooks or weights into the base model; leaving the block takes them all out again."""
        return nullcontext()

    def metrics(self) -> dict[str, Tensor]:
        """What the log says of it after each step, beside the losses: numbers of 0 dimensions where it lies.

        By default what its parts say of themselves.
        """
        parts: list[Any] = [part for part in self.children() if hasattr(part, "metrics")]
        return {name: value for part in parts for name, value in part.metrics().items()}

    def export(self, base: BaseModel, folder: Path) -> str:
        """Write what was learned into `folder` in a format that stock diffusers loads; returns how to load it.

        Raises:
            InputError: there is no such format.
        """
        raise InputError(f"there is no public format for what {type(self).__name__} learns, so it cannot be exported")

    @classmethod
    def imported(cls, config: Recipe, base: BaseModel, concept: Concept, path: Path) -> Method:
        """The method with what another program learned: `path` is a file or folder like those that `export` writes.

        Raises:
            InputError: it cannot be read, does not fit, or this method has no such format.
        """
        raise InputError(f"nothing can be imported for {cls.__name__}: no public format holds all that it learns")


@runtime_checkable
class SeesImages(Protocol):
    """A method that looks at the concept images themselves, before its training, if it has any.

    What it keeps of them are buffers: they belong to its artifact, which is proved like one that was trained.
    """

    def check_sight(self, base: BaseModel) -> None:
        """Raise InputError where it will not be able to see: all that `see` reads is read; nothing is computed."""
        ...

    def see(self, images: Sequence[Image.Image], base: BaseModel) -> None:
        """images: all of the concept that it may learn from, upright, in RGB."""
        ...


@runtime_checkable
class MasksReferences(Protocol):
    """A method that attends to concept images, and looks for the concept in them."""

    def object_masks(self, base: BaseModel, prompt: str, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents of the R concept images, (R, 4, h, w), and layer -> (R, h*w) bool: where it sees the concept there.

        Args:
            prompt: as the method says it.
            t: timestep, 0 to 999.
        """
        ...


def equal_shares(rows: int, total: float = 1.0) -> Tensor:
    """(rows, 1, 1, 1): weights of rows that share `total` equally; with total 1 their loss is the plain mean."""
    return torch.full((rows, 1, 1, 1), total / rows)


def count(module: nn.Module) -> int:
    """How many numbers the module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
