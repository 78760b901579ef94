"""params.yaml: every number that an experiment may change, checked when it is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from personalize_core.base_model.loading import NAMES, is_address
from personalize_core.errors import InputError, listed, shown
from personalize_core.files.outside import is_there
from personalize_core.files.typed_yaml import Values, as_written, build, validated
from personalize_core.methods import (
    ABLATION_NAMES,
    BASELINE,
    MARK,
    METHOD_NAMES,
    ablation_changes,
    check_method,
    known_methods,
    method_of,
    recipe_class,
)
from personalize_core.methods.shared.options import STRATEGY_NAMES
from personalize_core.training.micro_batches import MicroBatch
from personalize_core.training.optimizers import OptimizerName
from personalize_core.workspace.automation import Automation
from personalize_core.workspace.encoder_settings import Encoders
from personalize_core.workspace.held_out_setting import HeldOut
from personalize_core.workspace.judge_setting import Judge
from personalize_core.workspace.probe_settings import ProbeSettings
from personalize_core.workspace.sampling_settings import SamplerSettings, Sampling
from personalize_core.workspace.sections import MOST_SEED, Section
from personalize_core.workspace.variants import NAME as VARIANT_NAME
from personalize_core.workspace.variants import Variant, checked_variant, variant_of

ABLATION_NAME = re.compile(r"(?=.{1,50}$)[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")


class Params(Section):
    """params.yaml."""

    base_model: Annotated[str, Field(min_length=1, max_length=1000)]
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None  # side length in pixels; None: the base model's own
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False  # of U-Net and text encoder in training
    micro_batch: MicroBatch = None  # rows of a batch that pass through the U-Net at once in training
    optimizer: OptimizerName = "adamw"
    compile: bool = False  # the U-Net's transformer blocks, in training and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"
    probes: ProbeSettings = ProbeSettings()  # how a training is watched
    deterministic: bool = False  # on a GPU: the same bits from one run to the next, with slower kernels
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)]
    sampling: Sampling
    held_out: HeldOut = 0  # concept images that no method is trained on: how many, or which share; concepts/held_out.py
    class_images: SamplerSettings  # for prior preservation; apart, so that another protocol trains nothing again
    encoders: Encoders
    judge: Judge | None = None  # None: no model is asked
    baseline: str = BASELINE  # the variant that the others are compared with; or the label of an external column
    methods: dict[str, dict[str, Values]]  # method -> base model -> what its recipe changes for that base model
    # The same for METHOD@ABLATION, on top of the method's own recipe; also for names that the method's recipe lacks.
    ablations: dict[str, dict[str, Values]] = {}
    automation: Automation = Automation()
    variants: dict[str, dict[str, Values]]  # method or ablation -> variant -> sampling options; see sampling_variants

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, sections: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in sections if name not in METHOD_NAMES]
        if unknown:
            known = f"the methods are {listed(METHOD_NAMES)}"
            raise ValueError(f"there is no method {listed(map(shown, unknown))}; {known}")
        return sections

    @model_validator(mode="after")
    def _known_base_models(self) -> Params:
        """A section under a misspelt base model would change nothing, and the published recipe would be used."""
        sections = [("methods", name, each) for name, each in self.methods.items()]
        sections += [("ablations", name, each) for name, each in self.ablations.items()]
        unknown = [
            f"{kind}.{method}.{base}"
            for kind, method, bases in sections
            for base in bases
            if base != self.base_model and base not in NAMES and not is_address(base)
        ]
        if unknown:
            raise ValueError(
                f"{listed(map(shown, unknown))}: there is no such base model; known are {listed(NAMES)}, a folder and "
                "a hub id, each spelled as base_model is"
            )
        return self

    @field_validator("ablations")
    @classmethod
    def _known_ablations(cls, sections: dict[str, Any]) -> dict[str, Any]:
        for name, bases in sections.items():
            check_method(method_of(name))
            if MARK not in name:
                raise ValueError(f"{name!r} is a method; write it under methods, or as METHOD{MARK}ABLATION")
            if name in ABLATION_NAMES:
                continue
            if not any(bases.values()):
                raise ValueError(
                    f"{name} is no ablation of the recipe, so its section says what it changes; write for instance "
                    f"`{name}: {{ mini: {{ steps: 300 }} }}`"
                )
            if not ABLATION_NAME.fullmatch(name.partition(MARK)[2]):
                raise ValueError(
                    f"{name!r} cannot be the name of an ablation, since folders are named after it; use 1 to 50 "
                    f"lower-case letters, digits, '_', '-' and '.' behind the {MARK}, with a letter or digit first and "
                    "behind every '.'"
                )
            for suffix, strategy in STRATEGY_NAMES.items():
                if name.endswith(f"_{suffix}"):
                    raise ValueError(
                        f"{name!r} cannot be the name of an ablation: with _{suffix} at the end it reads as one "
                        f"sampled with {strategy}; take another ending"
                    )
        return sections

    @field_validator("variants")
    @classmethod
    def _known_and_apart(cls, sections: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "ablations" not in info.data:
            return sections  # it is refused, and what variants may be called depends on it
        own = info.data["ablations"]
        owners: dict[str, str] = {}
        for method, variants in sections.items():
            check_method(method, own)
            for name in variants:
                if not VARIANT_NAME.fullmatch(name):
                    raise ValueError(
                        f"{name!r} cannot be the name of a variant of {method}, since files are named after it; use 1 "
                        "to 100 lower-case letters, digits, '_', '-', '.' and '@', beginning with a letter or digit"
                    )
                if name != method and name in known_methods(own):
                    raise ValueError(f"a variant of {method} cannot be called {name!r}: that is another method's name")
                if name in owners:
                    raise ValueError(
                        f"{owners[name]} and {method} both have a variant {name!r}; scores are summarised by this "
                        "name, so give one of them another"
                    )
                owners[name] = method
        return sections

    @model_validator(mode="after")
    def _known_cells_of_the_canary(self) -> Params:
        for concept, methods in self.automation.canary.items():
            for method in methods:
                try:
                    self.check_method(method)
                except InputError as error:
                    raise ValueError(f"automation.canary.{concept}: {error}") from error
        return self

    @classmethod
    def read(cls, path: Path) -> Params:
        """Raises InputError with the key that is wrong."""
        if not is_there(path):
            raise InputError(f"{path} does not exist; run this in the project's folder, or name the folder with --root")
        return validated(cls, path)

    @classmethod
    def read_automation(cls, path: Path) -> Automation:
        """The section `automation`; its defaults where there is no such file."""
        return cls.read(path).automation if path.is_file() else Automation()

    @classmethod
    def read_known_methods(cls, path: Path) -> list[str]:
        """As `known_methods`; those of the recipes where there is no such file."""
        return cls.read(path).known_methods if path.is_file() else known_methods()

    @property
    def method_names(self) -> list[str]:
        """The methods and ablations of this experiment, in params.yaml's order.

        An ablation that no recipe has belongs to the base models that its section has something for.
        """
        here = [name for name, bases in self.ablations.items() if name in ABLATION_NAMES or bases.get(self.base_model)]
        return [*self.methods, *here]

    @property
    def known_methods(self) -> list[str]:
        """All that can be trained here: the methods, the ablations of their recipes, and those of `ablations`."""
        return known_methods(self.ablations)

    def check_method(self, name: str) -> None:
        """Raise InputError unless there is such a method, or such an ablation of it here."""
        check_method(name, self.ablations)

    def config(self, method: str) -> Any:
        """The method's recipe on this base model: its published defaults, and what params.yaml changes.

        That of an ablation is its method's, with what the ablation changes and then its own section.

        Raises:
            InputError: an option is unknown or contradicts another, or an ablation is its method itself on this base
                model, so that the two would be one experiment under two names.
        """
        config, plain = self._recipe(method), method_of(method)
        if plain != method and config == self._recipe(plain):
            changes = ablation_changes(method) | self.ablations.get(method, {}).get(self.base_model, {})
            already = listed(f"{name} = {as_written(value)}" for name, value in changes.items())
            section = f"ablations.{method}"
            if not changes:
                why = f"{section} says nothing of it; add {section}.{self.base_model}"
            elif method in ABLATION_NAMES:
                why = f"its recipe already has {already}"
            else:
                why = f"its recipe already has {already}; take {section} out"
            raise InputError(f"{method} is {plain} itself on {self.base_model}: {why}")
        return config

    def _recipe(self, method: str) -> Any:
        self.check_method(method)
        kind, base, plain = recipe_class(method), self.base_model, method_of(method)
        changes, where = self.methods.get(plain, {}).get(base, {}), f"params.yaml, methods.{plain}.{base}"
        if plain != method:
            changes = changes | ablation_changes(method) | self.ablations.get(method, {}).get(base, {})
            where = f"{method} ({where}, the ablation and ablations.{method}.{base})"
        return build(kind, changes, where)

    def sampling_variants(self, method: str) -> dict[str, Variant]:
        """Variant -> how it samples; a method without an entry has one variant of its own name.

        Its options are the method's own, and test-time optimization for any method that holds one text embedding.

        The options of all other methods are looked at too (`check_spelling`).

        Raises:
            InputError: an option is unknown or does not apply to this method, or to the way it is trained.
        """
        for other in self.variants:
            if other != method:
                self.check_spelling(other)
        return self.own_variants(method)

    def check_spelling(self, method: str) -> None:
        """Raise InputError if an option of the method's variants is unknown, as far as that depends on no recipe."""
        for name, options in self.variants.get(method, {}).items():
            variant_of(name, method, self._recipe(method), options, spelling_alone=True)

    def own_variants(self, method: str) -> dict[str, Variant]:
        """As `sampling_variants`, without a look at other methods."""
        sections = self.variants.get(method) or {method: {}}
        config = self.config(method)
        return {name: checked_variant(name, method, config, options) for name, options in sections.items()}
