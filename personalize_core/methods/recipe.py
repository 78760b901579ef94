"""What can be known of a method without tensors: how it is trained, how it can be sampled, and what people call it.

Nothing here, and nothing that a method's `recipe.py` imports, needs torch: params.yaml, plans, documentation and the
command line read recipes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError, listed
from personalize_core.methods.adaptive import Adaptive
from personalize_core.methods.options import options


def refuse_idle(chosen: Any, *names: str, off: str) -> None:
    """Raise InputError if one of these options is set, although another leaves it without effect.

    An option counts as set when it differs from its default: whether it was written out cannot be seen.

    Args:
        chosen: a Config or Sampling.
        off: the other option, as a person writes it.
    """
    defaults = {field.name: field.default for field in fields(chosen)}
    idle = [f"{name} = {getattr(chosen, name)!r}" for name in names if getattr(chosen, name) != defaults[name]]
    if idle:
        one = len(idle) == 1
        raise InputError(
            f"{listed(idle)} {'does' if one else 'do'} nothing with {off}; take {'it' if one else 'them'} out"
        )


NOTHING_INSIDE = {"lag": "nothing that it learns acts inside the U-Net"}


@options
class NoOptions:
    """The sampling options of a method that has none."""


@dataclass(frozen=True)
class Ablation:
    """A method with some of its configuration changed; METHOD@ABLATION is used like a method's name.

    An option that the change leaves without effect must be changed back to its default, since the method's recipe for
    a base model may set it.
    """

    changes: Mapping[str, Any]  # option of the method's Config -> value
    display_name: str | None = None  # None: the method's display name and this ablation's name with spaces


LOWER, HIGHER = 0.1, 10.0  # of a learning rate, times today's: what a search tries
SHORTER, LONGER = 0.25, 2.0  # of a number of steps; longer trainings cost more


@dataclass(frozen=True)
class Range:
    """Where a search looks for a number of a recipe: between two numbers, both among them, evenly in the logarithm.

    Of two ints whole numbers alone.
    """

    low: float
    high: float


@options
class Recipe:
    """Base class of every method's `Config`: its options are how the method is trained, the rest is derived from them.

    A method's `recipe.py` defines `Config`, a dataclass under `@options` that inherits this class. The first paragraph
    of its docstring says in a sentence what is learned; the defaults of its fields are the published recipe. An
    instance is saved in every artifact.

    `recipe.py` holds no constant that training computes with: artifacts depend on the *values* of a Config and on
    `method.py`, not on the text of `recipe.py`, so that a display name can be corrected without training again.
    """

    display_name: ClassVar[str]  # as the paper writes it; no comma and no "and", because names stand in lists
    learns: ClassVar[str]  # what is trained, in a few words, for the table of methods in docs/methods.md
    authors: ClassVar[str] = ""
    title: ClassVar[str] = ""
    venue: ClassVar[str] = ""  # conference and year; empty for a preprint
    arxiv: ClassVar[str] = ""  # number, which also gives the order of methods in tables
    Sampling: ClassVar[type] = NoOptions  # how a trained artifact is used; chosen for each sampling run
    ablations: ClassVar[Mapping[str, Ablation]] = {}

    adaptive: Adaptive | None = field(default=None, kw_only=True)  # None: as many steps as the recipe says

    @classmethod
    def citation(cls) -> str:
        """The paper in one sentence; empty for a method without one."""
        if not cls.title:
            return ""
        return ", ".join(part for part in (cls.authors, f'"{cls.title}"', cls.venue, f"arXiv:{cls.arxiv}.") if part)

    @property
    def preprocessing(self) -> Preprocessing:
        """How concept images become training images."""
        raise NotImplementedError(f"{type(self).__module__} does not say how concept images are prepared")

    @property
    def lacks(self) -> Mapping[str, str]:
        """Sampling options of other methods -> why they do not apply here, where there is more to say than that."""
        return NOTHING_INSIDE

    @property
    def text_embeddings(self) -> int:
        """How many input embeddings of the text encoder are learned for the concept; one can be refined per prompt."""
        return 0

    @property
    def training_steps(self) -> int:
        """How many steps of the optimizer training takes, over all its stages."""
        return sum(getattr(self, field.name) for field in fields(cast(Any, self)) if field.name.endswith("steps"))

    def search_space(self) -> dict[str, Range]:
        """The numbers that `personalize tune` changes, and how far: learning rates and steps.

        A recipe with further numbers to search adds them; one in which some depend on each other narrows theirs.
        """
        found: dict[str, Range] = {}
        for each in fields(cast(Any, self)):
            value = getattr(self, each.name)
            if not value:  # a stage that is left out, or a rate that is another's
                continue
            if each.name.endswith("steps"):
                if self.adaptive:  # which itself finds how many are enough
                    continue
                found[each.name] = Range(math.ceil(SHORTER * value), math.floor(LONGER * value))
            elif "lr" in each.name.split("_"):
                found[each.name] = Range(LOWER * value, HIGHER * value)
        return found

    @property
    def suggested_class_noun(self) -> bool:
        """Whether the noun that `personalize suggest-class` ranks first stands in the place of the concept's own."""
        return False

    @property
    def files(self) -> str:
        """Names by their content the files that its options point to; empty where they point to none.

        Raises:
            InputError: there is no such file.
        """
        return ""

    @property
    def class_images_needed(self) -> int:
        """How many images of the class noun training needs beside the concept's; sampled from the base model."""
        return 0

    @property
    def real_class_images(self) -> bool:
        """Whether the class images are all images of data/regularization, instead of the base model's."""
        return False

    @property
    def needs_one_text_encoder(self) -> str:
        """Why it is not defined on a base model with two text encoders, Stable Diffusion XL; empty where it is."""
        return ""

    @property
    def starts_as_base_model(self) -> bool:
        """Whether the untrained method predicts what the base model predicts."""
        return True

    @property
    def samples_as_it_trains(self) -> bool:
        """Whether it predicts the same in training and in sampling; not with dropout, or an input of training's own."""
        return True

    @property
    def samples_by_weights(self) -> bool:
        """Whether all that sampling without LAG changes in the networks are weights, which others take the place of."""
        return False

    def check(self, sampling: Any) -> None:
        """Raise InputError if what is trained by this recipe cannot be sampled with these options."""

    def images_needed(self, sampling: Any) -> int:
        """How many concept images are needed, to train by this recipe and sample with these options."""
        return 1
