"""What a probe looks at while a method learns a concept: a few images, and how good they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.concepts.concept import SLOT
from personalize_core.errors import InputError
from personalize_core.steps.probe_conditions import check_held_out, held_out_of, options_of
from personalize_core.steps.probe_record import opened, save_record
from personalize_core.training.watch import Heard, Probed, Probes, Watch
from personalize_core.training.watcher import Watched
from personalize_core.workspace.recipes import images_trained_on, prompts_of
from personalize_core.workspace.stamps.training import TrainingInputs
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.images import ConceptLatents
    from personalize_core.methods.interface import Method


class Probing:
    """A training that is watched, and what was seen of it.

    Raises:
        InputError: it is to choose by identity, and no image of the concept is held out; or an encoder cannot be had.
    """

    def __init__(
        self,
        store: Store,
        inputs: TrainingInputs,
        learner: Method,
        base: BaseModel,
        images: ConceptLatents,
        timed: Callable[[float], None],
        heard: Heard | None = None,
    ) -> None:
        """timed: is told of each probe how many seconds it took."""
        adaptive, settings = inputs.config.adaptive, store.params.probes
        share = adaptive.share if adaptive else settings.share
        self.timed, self.watch = timed, None
        if not share:
            return
        self.eye = Eye(store, inputs, base)
        check_held_out(store, inputs.concept.name, inputs.method)
        probes = Probes(self._look, len(self.eye.prompts), settings.steps)
        self.watch = Watch(learner, base, images, store.training_seed, probes, share, adaptive, heard)

    def _look(self, method: Method) -> Probed:
        begun = time.monotonic()
        probed = self.eye.look(method)
        self.timed(time.monotonic() - begun)
        return probed

    @property
    def fixed_inputs(self) -> list[dict[str, Any]]:
        """The loss on fixed inputs whenever it was taken: "stage", "step", "value"; empty where nobody watched."""
        losses = self.watch.losses if self.watch else []
        return [{"stage": one["stage"], "step": one["step"], "value": sum(one["values"])} for one in losses]

    def save(self, folder: Path) -> None:
        """What was seen, into the folder of what was learned."""
        if self.watch:
            save_record(self.watch, self.eye.prompts, folder)


def check_share(store: Store, inputs: TrainingInputs, learner: Method, base: BaseModel) -> None:
    """Raise InputError where `share` is too small for what `adaptive` decides by. Nothing of the concept is read."""
    import torch

    from personalize_core.concepts.images import ConceptLatents

    if not inputs.config.adaptive:
        return
    nothing = [torch.zeros(1, 2, *base.latent_shape)]
    probing = Probing(store, inputs, learner, base, ConceptLatents(nothing, nothing), lambda seconds: None)
    if probing.watch:
        try:
            probing.watch.begin(learner.stages(), Watched())
        except InputError as error:
            raise InputError(f"{error}; {options_of(store, inputs.method)}") from error


class Eye:
    """Samples the first prompts of a concept's list, and its class noun, always from the same noise.

    Its encoders stay on the CPU: for a few images that takes little time, and a graphics card is full of what trains.
    """

    def __init__(self, store: Store, inputs: TrainingInputs, base: BaseModel) -> None:
        self.store, self.concept, self.base = store.without_protocol(), inputs.concept, base
        self.settings, self.how = self.store.params.probes, self.store.params.sampling
        self.templates = prompts_of(self.store, self.concept.name).templates[: self.settings.prompts]

    @property
    def prompts(self) -> list[str]:
        """What its images show, in their order; the last one is without the concept."""
        named = [template.replace(SLOT, self.concept.placeholder) for template in self.templates]
        return [*named, self._class_prompt]

    def look(self, method: Method) -> Probed:
        """The method's images, and of each but the last its metrics; of that one how far it drifted."""
        from personalize_core.metrics.balance import balance_of
        from personalize_core.metrics.similarity import (
            drift_per_image,
            image_alignment_per_image,
            text_alignment_per_image,
        )

        said = [*(method.say(template) for template in self.templates), self._class_prompt]
        images = self._sampled(method, said)
        of_concept, of_noun = images[:-1], images[-1:]
        features, trained_on = self._identity(of_concept), self._trained_on
        references = self._held_out if self.held_out else trained_on
        looks_for = self._identity_encoder.looks_for
        identity = image_alignment_per_image(features, references, looks_for)
        text = text_alignment_per_image(self._text_image.images(opened(of_concept)), self._texts)
        metrics = {
            "identity": identity,
            "text": text,
            "balance": balance_of(identity.numpy(), text.numpy()),
            "copying": (features @ trained_on.T).amax(dim=1),
            "drift": drift_per_image(self._identity(of_noun), self._untouched, looks_for),
        }
        return Probed(images, {name: values.tolist() for name, values in metrics.items()})

    @cached_property
    def held_out(self) -> list[Path]:
        """The concept images that "identity" is taken with, where any is held out; else those trained on."""
        return held_out_of(self.store, self.concept.name)

    @property
    def _class_prompt(self) -> str:
        return f"a photo of a {self.concept.class_noun}"

    def _sampled(self, method: Method, prompts: Sequence[str]) -> Tensor:
        """(N, H, W, 3) uint8."""
        from personalize_core.sampling.some_images import images_by

        places = [(place, 0) for place in range(len(prompts))]
        return images_by(method, self.base, prompts, places, self.how, self.settings.steps, self.store.sampling_seed)

    @cached_property
    def _untouched(self) -> Tensor:
        """(1, D): the base model's image of the class noun."""
        from personalize_core.methods.interface import Method
        from personalize_core.methods.recipe import Recipe

        plain = Method(Recipe(), self.base, self.concept)
        prompts = [*(plain.say(template) for template in self.templates), self._class_prompt]
        return self._identity(self._sampled(plain, prompts)[-1:])

    def _identity(self, images: Tensor) -> Tensor:
        """(N, D) float64, rows of length one, or of zeros where nothing is found that the encoder looks for."""
        from personalize_core.metrics.similarity import directions

        encoder = self._identity_encoder
        return directions(encoder.images(opened(images)), "image", encoder.looks_for)

    @cached_property
    def _held_out(self) -> Tensor:
        return self._of_files(self.held_out)

    @cached_property
    def _trained_on(self) -> Tensor:
        return self._of_files(images_trained_on(self.store, self.concept.name))

    def _of_files(self, paths: Sequence[Path]) -> Tensor:
        from personalize_core.concepts.image_files import load_image
        from personalize_core.metrics.similarity import with_something

        encoder = self._identity_encoder
        features = encoder.images([load_image(path) for path in paths])
        with _or_unwatched():
            return with_something(features, encoder.looks_for)

    @cached_property
    def _texts(self) -> Tensor:
        noun = self.concept.class_noun
        return self._text_image.texts([template.replace(SLOT, noun) for template in self.templates])

    @cached_property
    def _identity_encoder(self):
        from personalize_core.metrics.encoders import load_identity_encoder

        with _or_unwatched():
            return load_identity_encoder(self.store.params.encoders.identity[0])

    @cached_property
    def _text_image(self):
        from personalize_core.metrics.encoders import load_text_image_encoder

        with _or_unwatched():
            return load_text_image_encoder(self.store.params.encoders.text_image[0])


@contextmanager
def _or_unwatched() -> Iterator[None]:
    """Say how a training goes without the encoder that cannot be had."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error}; to train without watching, write `probes: {{ share: 0 }}` in params.yaml"
        ) from error
