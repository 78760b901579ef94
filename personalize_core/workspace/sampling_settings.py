"""params.yaml, sampling and class_images: how the sampler runs, and which prompts are for which concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from personalize_core.files.bounds import cost_of_images
from personalize_core.workspace.sections import Section

if TYPE_CHECKING:
    from personalize_core.concepts.concept import Concept


TIMESTEPS = 1000  # of every Stable Diffusion; a sampler takes some of them
MOST_IMAGES = 1000  # for each prompt


class SamplerSettings(Section):
    """How the sampler runs."""

    sampler: Literal["ddim", "dpm-solver++"]
    steps: Annotated[int, Field(gt=0, le=TIMESTEPS)]
    guidance: Annotated[float, Field(ge=0, le=100)]
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # of DDIM: new noise in each step; 0 none, 1 as much as DDPM

    @model_validator(mode="after")
    def _only_ddim_adds_noise(self) -> SamplerSettings:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta = {self.eta} is an option of ddim; {self.sampler} adds no noise, so take eta out")
        return self


class PromptList(Section):
    """A list of prompts, and which concepts are sampled in it; one that names none is for all others."""

    name: str  # in data/prompts, without ".txt"
    class_nouns: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    without_identity: tuple[Annotated[int, Field(gt=0)], ...] = ()  # rows, from 1, that only CLIP-T looks at

    @property
    def for_others(self) -> bool:
        return not (self.class_nouns or self.concepts)

    def suits(self, concept: Concept) -> bool:
        return self.for_others or concept.name in self.concepts or concept.class_noun.lower() in self.class_nouns


def _few_enough(images: int) -> int:
    if images > MOST_IMAGES:
        cost = f"; for each prompt, {cost_of_images(images)}" if images < 1e30 else ""
        raise ValueError(f"it should be at most {MOST_IMAGES}{cost}")
    return images


class Sampling(SamplerSettings):
    """What is sampled of every concept; the same for every method."""

    images_per_prompt: Annotated[int, Field(gt=0), AfterValidator(_few_enough)]
    prompts: tuple[PromptList, ...]  # the first that suits a concept is its own; written as a name, it is for all

    @field_validator("prompts", mode="before")
    @classmethod
    def _by_name(cls, written: Any) -> Any:
        return [{"name": written}] if isinstance(written, str) else written

    @field_validator("prompts")
    @classmethod
    def _one_for_every_concept(cls, lists: tuple[PromptList, ...]) -> tuple[PromptList, ...]:
        if not lists or [each.for_others for each in lists] != [False] * (len(lists) - 1) + [True]:
            raise ValueError("the last list, and only that one, must be for all other concepts: it names none")
        return lists

    def prompts_for(self, concept: Concept) -> PromptList:
        return next(each for each in self.prompts if each.suits(concept))

    def how(self) -> dict[str, Any]:
        """All that an image depends on, apart from its prompt, its seed and its method."""
        return self.model_dump(include={*SamplerSettings.model_fields, "images_per_prompt"})
