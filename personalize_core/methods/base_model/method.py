"""The base model without personalization."""

from __future__ import annotations

from personalize_core.methods.base_model.recipe import Config
from personalize_core.methods.interface import Method, Stage


class BaseModelAlone(Method):
    """The base model, prompted with the concept's class noun."""

    Config = Config

    @property
    def phrase(self) -> str:
        return self.concept.class_noun

    def stages(self) -> list[Stage]:
        return []
