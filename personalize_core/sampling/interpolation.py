"""A word between two concepts' words.

Kim et al., "Directional Textual Inversion for Personalized Text-to-Image Generation", ICLR 2026, arXiv:2512.13672,
interpolate the directions of two learned embeddings over the sphere (slerp). Theirs have one norm, which stays. Where
the norms differ, as Textual Inversion's do, they are interpolated on a straight line: that is ours, for the code of the
authors does not hold what they interpolated with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.errors import InputError
from personalize_core.methods import METHOD_NAMES, method_class
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.one_embedding import EmbeddingAlone

OPPOSITE = 1e-6  # rad: how near to half a turn an angle leaves open which way round leads from one to the other


class Between(Method):
    """Two trained methods that sample as one, whose word lies `share` of the way from the first's to the second's.

    The prompt names the first concept, as its method says it. It learns nothing and is not saved.

    Args:
        widths: of what each text encoder of the base model reads; by default there is one.

    Raises:
        InputError: one of them has learned more than a word, or the words point in opposite directions.
    """

    def __init__(self, first: Method, second: Method, share: float, widths: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)
        self.first, self.concept, self.config = first, first.concept, first.config
        words = word_of(first).vector, word_of(second).vector
        parts = zip(*(word.split(list(widths or word.shape)) for word in words), strict=True)
        self.vector = torch.cat(
            [interpolated(one, other, share) for one, other in parts]
        )  # each on a sphere of its own

    @property
    def phrase(self) -> str:
        return self.first.phrase

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        with word_of(self.first).reading(self.vector):
            return self.first.condition(base, prompts)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return self.first.attach(base)


def learns_a_word_alone(method: str) -> bool:
    """Is one text embedding all that it learns?"""
    return issubclass(method_class(method), EmbeddingAlone)


def check_learns_a_word_alone(method: str) -> None:
    """Raise InputError if it learns something else, or nothing."""
    if not learns_a_word_alone(method):
        known = " or ".join(name for name in METHOD_NAMES if learns_a_word_alone(name))
        raise InputError(
            f"{method} does not learn one word and nothing else, so no way over words leads from its concept to "
            f"another; take {known}"
        )


def word_of(method: Method) -> ConceptEmbedding:
    """The one text embedding that a method has learned, and nothing else.

    Raises:
        InputError: it has learned something else.
    """
    if not isinstance(method, EmbeddingAlone):
        raise InputError(
            f"{type(method).__name__} has not learned one word for {method.concept.name!r} and nothing else"
        )
    return method.embedding


@torch.no_grad()
def interpolated(first: Tensor, second: Tensor, share: float) -> Tensor:
    """(D,): the direction by slerp, the norm on a straight line; with a share of 0 or 1 one of the two, to the bit.

    With unit vectors u and v at the angle theta: (sin((1 - share) theta) u + sin(share theta) v) / sin theta.

    Args:
        first, second: (D,), not zero.
        share: in [0, 1].

    Raises:
        InputError: they point in opposite directions.
    """
    if share in (0.0, 1.0):
        return (second if share else first).detach().clone()
    a, b = first.double(), second.double()
    u, v = F.normalize(a, dim=0), F.normalize(b, dim=0)
    theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # exact for small angles, where arccos is not
    if torch.pi - theta < OPPOSITE:
        raise InputError("the two words point in opposite directions, so no way over the sphere is the shortest")
    if theta == 0:
        direction = u
    else:
        direction = (torch.sin((1 - share) * theta) * u + torch.sin(share * theta) * v) / torch.sin(theta)
    return (torch.lerp(a.norm(), b.norm(), share) * F.normalize(direction, dim=0)).to(first)
