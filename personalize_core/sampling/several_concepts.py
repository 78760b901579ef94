"""Several concepts in one image, each learned by an artifact of its own.

The authors of Personalized Residuals name this as future work (arXiv:2405.12978, sec. 5). All artifacts are attached
at once, each confined by LAG to where its own concept is looked at; see methods/shared/lag.py for who gets a location
that two concepts want.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.errors import InputError, listed
from personalize_core.methods.interface import Method
from personalize_core.methods.recipe import Recipe
from personalize_core.methods.shared.options import LAG


class Together(Method):
    """Trained methods that sample as one. It learns nothing and is not saved; its parts are.

    Raises:
        InputError: fewer than two parts, two of one concept, or a part that cannot be confined to a region.
    """

    def __init__(self, parts: Sequence[Method], base: BaseModel) -> None:
        if len(parts) < 2:
            raise InputError("images of several concepts need two artifacts at least")
        super().__init__(Recipe(), base, parts[0].concept)
        twice = [name for name, times in Counter(part.concept.name for part in parts).items() if times > 1]
        if twice:
            raise InputError(f"{listed(twice)} is named twice; one artifact of each concept can be in an image")
        for place, part in enumerate(parts):
            part.place, part.sampling = place, _confined(part)
        self.parts = nn.ModuleList(parts)

    def say(self, template: str) -> str:
        """A user's prompt with every concept said as its own method says it.

        Raises:
            InputError: a concept is not in the prompt.
        """
        for part in self._parts():
            template = part.say(part.concept.template(template))
        return template

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        contexts = [self._context_of(part, base, prompts) for part in self._parts()]
        together = replace(contexts[0], several=torch.stack([context.concept for context in contexts]))
        return lambda t: together

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for part in self._parts():
            stack.enter_context(part.attach(base))
        return stack

    def _context_of(self, part: Method, base: BaseModel, prompts: Sequence[str]) -> TextContext:
        """What one part's own words are in the prompts, where every other placeholder is the rare word it reads."""
        others = [other.concept.placeholder for other in self._parts() if other is not part]
        for placeholder in others:
            prompts = [prompt.replace(placeholder, base.tokenizer.rare_word) for prompt in prompts]
        return base.encode(prompts, part.concept)

    def _parts(self) -> list[Method]:
        return list(self.parts)  # type: ignore[arg-type]


def _confined(part: Method) -> Any:
    """The part's sampling options with LAG on."""
    recipe = part.config
    if not issubclass(recipe.Sampling, LAG):
        why = recipe.lacks.get("lag", "it cannot be confined to a region")
        raise InputError(
            f"{type(part).__name__} cannot share an image with another concept: {why}; what acts inside the U-Net's "
            "transformers alone, such as personalized_residuals, can be confined to a region"
        )
    if recipe.text_embeddings:
        raise InputError(
            f"{part.concept.name!r} has learned an embedding for its placeholder; in an image of several concepts "
            "every placeholder reads the same rare word, so it takes a method that learns none, such as "
            "personalized_residuals as it is published"
        )
    sampling = recipe.Sampling(lag=True)
    recipe.check(sampling)
    return sampling
