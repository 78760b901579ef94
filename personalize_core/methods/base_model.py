"""The base model without personalization: it learns nothing, and is the baseline that every method must beat.

It names the concept by its class noun alone. Being a method like any other, it is drawn with the same noise,
scored by the same rules and stands in the same tables, with no special case anywhere.
"""

from __future__ import annotations

from personalize_core.concepts.images import Preprocessing
from personalize_core.methods.interface import Method, Stage, options


@options
class Config:
    """Nothing to choose."""


class BaseModelAlone(Method):
    """The base model, asked for a thing of the concept's kind."""

    Config = Config
    preprocessing = Preprocessing("crop", "bilinear", flip=False)

    @property
    def phrase(self) -> str:
        return self.concept.class_noun

    def stages(self) -> list[Stage]:
        return []
