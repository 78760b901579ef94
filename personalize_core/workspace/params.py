"""params.yaml: every number that an experiment may change, checked when it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from personalize_core.errors import InputError, listed
from personalize_core.files.typed_yaml import Values, as_written, build, keys_of, unknown_key, validated
from personalize_core.methods import (
    ABLATION_NAMES,
    MARK,
    METHOD_NAMES,
    RECIPES,
    ablation_changes,
    check_method,
    method_of,
    recipe_class,
)
from personalize_core.methods.shared.options import Refinement

if TYPE_CHECKING:
    from personalize_core.concepts.concept import Concept

TextVariant = Literal["class_phrase", "slot_deleted", "full_prompt"]
_VARIANT = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,99}")
REFINE = "test_time_optimization"  # stands beside a method's own sampling options


@dataclass(frozen=True)
class Variant:
    """One way to sample what a method learned, without training it again."""

    name: str
    sampling: Any  # the method's own options
    refinement: Refinement | None = None  # test-time optimization, apart from any method; None: not wanted


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplerSettings(_Strict):
    """How the sampler runs."""

    sampler: Literal["ddim", "dpm-solver++"]
    steps: Annotated[int, Field(gt=0)]
    guidance: Annotated[float, Field(ge=0)]
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # of DDIM: new noise in each step; 0 none, 1 as much as DDPM

    @model_validator(mode="after")
    def _only_ddim_adds_noise(self) -> SamplerSettings:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta = {self.eta} is an option of ddim; {self.sampler} adds no noise, so take eta out")
        return self


class PromptList(_Strict):
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


class Sampling(SamplerSettings):
    """What is sampled of every concept; the same for every method."""

    images_per_prompt: Annotated[int, Field(gt=0)]
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


def _each_once(names: list[str]) -> list[str]:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{listed(map(repr, twice))} stands there more than once; name each once")
    return names


Names = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]


class Encoders(_Strict):
    """What the scores are computed with. The first encoder of each list is the headline: rankings and figures show it,
    the others stand beside it in the tables."""

    text_image: Names  # for CLIP-T and CLIP-I
    identity: Names  # for DINO
    segmenter: str | None = None  # for masked CLIP-I and DINO; None: they are not measured
    texts: Annotated[list[TextVariant], Field(min_length=1), AfterValidator(_each_once)] = [
        "class_phrase",
        "slot_deleted",
    ]  # for CLIP-T; see metrics/tables.py


class Automation(_Strict):
    """What the pipeline does by itself. No result depends on it."""

    arrival: Annotated[str, Field(min_length=1)] = "data/concepts"  # a folder, or an address that fsspec understands
    continuous: bool = False  # train a concept as soon as it has settled, and not only at night
    nightly: Annotated[str, Field(min_length=1)] = "0 2 * * *"  # cron: when whatever is out of date is trained
    canary: dict[str, Names] = {}  # concept -> methods: the cells that are run again after an upgrade

    @classmethod
    def of(cls, path: Path) -> Automation:
        """The section of params.yaml; the defaults where there is no such file."""
        return Params.read(path).automation if path.is_file() else cls()


class Params(_Strict):
    """params.yaml."""

    base_model: str
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False  # of the U-Net in training
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int
    sampling: Sampling
    class_images: SamplerSettings  # for prior preservation; apart, so that another protocol trains nothing again
    encoders: Encoders
    methods: dict[str, dict[str, Values]]  # method -> base model -> what its recipe changes for that base model
    ablations: dict[str, dict[str, Values]] = {}  # the same for METHOD@ABLATION, on top of the method's own recipe
    automation: Automation = Automation()
    variants: dict[str, dict[str, Values]]  # method or ablation -> variant -> sampling options; see sampling_variants

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, sections: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in sections if name not in METHOD_NAMES]
        if unknown:
            raise ValueError(f"there is no method {listed(map(repr, unknown))}; the methods are {listed(METHOD_NAMES)}")
        return sections

    @field_validator("ablations")
    @classmethod
    def _known_ablations(cls, sections: dict[str, Any]) -> dict[str, Any]:
        for name in sections:
            check_method(name)
            if MARK not in name:
                raise ValueError(f"{name!r} is a method; write it under methods, or as METHOD{MARK}ABLATION")
        return sections

    @field_validator("variants")
    @classmethod
    def _known_and_apart(cls, sections: dict[str, Any]) -> dict[str, Any]:
        owners: dict[str, str] = {}
        for method, variants in sections.items():
            check_method(method)
            for name in variants:
                if not _VARIANT.fullmatch(name):
                    raise ValueError(
                        f"{name!r} cannot be the name of a variant of {method}, since files are named after it; use 1 "
                        "to 100 lower-case letters, digits, '_', '-', '.' and '@', beginning with a letter or digit"
                    )
                if name != method and name in (*METHOD_NAMES, *ABLATION_NAMES):
                    raise ValueError(f"a variant of {method} cannot be called {name!r}: that is another method's name")
                if name in owners:
                    raise ValueError(
                        f"{owners[name]} and {method} both have a variant {name!r}; scores are summarised by this "
                        "name, so give one of them another"
                    )
                owners[name] = method
        return sections

    @classmethod
    def read(cls, path: Path) -> Params:
        """Raises InputError with the key that is wrong."""
        if not path.is_file():
            raise InputError(f"{path} does not exist; run this in the project's folder, or name the folder with --root")
        return validated(cls, path)

    @property
    def method_names(self) -> list[str]:
        """The methods and ablations of this experiment, in params.yaml's order."""
        return [*self.methods, *self.ablations]

    def config(self, method: str) -> Any:
        """The method's recipe on this base model: its published defaults, and what params.yaml changes.

        That of an ablation is its method's, with what the ablation changes and then its own section.

        Raises:
            InputError: an option is unknown or contradicts another, or an ablation is its method itself on this base
                model, so that the two would be one experiment under two names.
        """
        config, plain = self._recipe(method), method_of(method)
        if plain != method and config == self._recipe(plain):
            switches = ablation_changes(method) | self.ablations.get(method, {}).get(self.base_model, {})
            already = listed(f"{name} = {as_written(value)}" for name, value in switches.items())
            raise InputError(f"{method} is {plain} itself on {self.base_model}: its recipe already has {already}")
        return config

    def _recipe(self, method: str) -> Any:
        kind, base, plain = recipe_class(method), self.base_model, method_of(method)
        changes, where = self.methods.get(plain, {}).get(base, {}), f"params.yaml, methods.{plain}.{base}"
        if plain != method:
            changes = changes | ablation_changes(method) | self.ablations.get(method, {}).get(base, {})
            where = f"{method} ({where}, the ablation and ablations.{method}.{base})"
        return build(kind, changes, where)

    def sampling_variants(self, method: str) -> dict[str, Variant]:
        """Variant -> how it samples; a method without an entry has one variant of its own name.

        Its options are the method's own, and test-time optimization for any method that holds one text embedding.

        The options of all other methods are looked at too, as far as they do not depend on a recipe: a misspelled
        one is refused whatever is run.

        Raises:
            InputError: an option is unknown or does not apply to this method, or to the way it is trained.
        """
        for other, sections in self.variants.items():
            for name, options in sections.items() if other != method else ():
                _sampling(name, other, self._recipe(other), options, spelling_alone=True)
        sections = self.variants.get(method) or {method: {}}
        config = self.config(method)
        return {name: _variant(name, method, config, options) for name, options in sections.items()}


def _variant(name: str, method: str, config: Any, options: Values) -> Variant:
    variant = _sampling(name, method, config, options)
    try:
        config.check(variant.sampling)
    except InputError as error:
        raise InputError(f"{_place(method, name)}: {error}") from None
    return variant


def _sampling(name: str, method: str, config: Any, options: Values, spelling_alone: bool = False) -> Variant:
    """A variant whose options are known and take their values.

    With `spelling_alone` test-time optimization is known whether it applies under this config or not.
    """
    kind, where = config.Sampling, _place(method, name)
    known = [*keys_of(kind), *([REFINE] if config.text_embeddings == 1 else [])]
    for option in options:
        if option not in known and not (spelling_alone and option == REFINE):
            raise InputError(f"{where}: {_inapplicable(option, method, config) or unknown_key(option, known)}")
    sampling = build(kind, {key: value for key, value in options.items() if key != REFINE}, where)
    return Variant(name, sampling, _refinement(options[REFINE], f"{where}.{REFINE}") if REFINE in options else None)


def _place(method: str, variant: str) -> str:
    return f"params.yaml, variants.{method}.{variant}"


def _refinement(values: Any, where: str) -> Refinement:
    if not isinstance(values, dict):
        raise InputError(f"{where} = {values!r}: it should be options, or {{}} for the published ones")
    return build(Refinement, values, where)


def _inapplicable(option: str, method: str, config: Any) -> str | None:
    """What a sampling option of other methods does, why it does not apply to this one, and which have it."""
    published = {name: recipe() for name, recipe in RECIPES.items()}
    if option == REFINE:
        having = [name for name, recipe in published.items() if recipe.text_embeddings == 1]
        does = "refines the one text embedding that was learned, for each prompt"
        why = f"it learns {config.text_embeddings or 'none'}"
    else:
        having = [name for name, recipe in published.items() if option in keys_of(recipe.Sampling)]
        if not having:
            return None
        fields: Any = published[having[0]].Sampling
        does, why = fields.__pydantic_fields__[option].description, config.lacks.get(option)
    return f"{option} {does}, and does not apply to {method}{f': {why}' if why else ''}; it applies to {listed(having)}"
