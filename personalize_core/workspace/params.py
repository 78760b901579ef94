"""params.yaml: every number that an experiment may change, checked when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
    method_of,
    recipe_class,
)
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
    ablations: dict[str, dict[str, Values]] = {}  # the same for METHOD@ABLATION, on top of the method's own recipe
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
                if not VARIANT_NAME.fullmatch(name):
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
        if not is_there(path):
            raise InputError(f"{path} does not exist; run this in the project's folder, or name the folder with --root")
        return validated(cls, path)

    @classmethod
    def read_automation(cls, path: Path) -> Automation:
        """The section `automation`; its defaults where there is no such file."""
        return cls.read(path).automation if path.is_file() else Automation()

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
            changes = ablation_changes(method) | self.ablations.get(method, {}).get(self.base_model, {})
            already = listed(f"{name} = {as_written(value)}" for name, value in changes.items())
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
