"""The base model without personalization: it learns nothing, and is the baseline that every method must beat.

It names the concept by its class noun alone. Being a method like any other, it is sampled from the same noise,
scored by the same rules and stands in the same tables, with no special case anywhere.
"""

from __future__ import annotations

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Recipe, options


@options
class Config(Recipe):
    """The base model, prompted with the concept's class noun.

    There is nothing to choose.
    """

    display_name = "base model"
    learns = "nothing"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)
