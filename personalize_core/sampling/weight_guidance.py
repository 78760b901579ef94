"""Guidance that uses the base model's weights beside those that were learned.

Personalization guidance: Park et al., "Steering Guidance for Personalized Text-to-Image Diffusion Models", ICCV 2025,
arXiv:2508.00319. Consistency guidance: Lee et al., "Direct Consistency Optimization for Robust Customization of
Text-to-Image Diffusion Models", NeurIPS 2024, arXiv:2402.12004, where it is called reward guidance. Of both papers the
abstracts, project pages and summaries were at hand, not the text: what is written as a formula below is ours wherever
these say it in words. Both work on every method whose recipe says `samples_by_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.errors import InputError
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.options import ConsistencyGuidance, PersonalizationGuidance, WeightGuidance
from personalize_core.methods.shared.tuned_weights import placed
from personalize_core.sampling.sampler import Denoiser

Look = Callable[[AttentionMaps], None]


class WeightGuided(Method):
    """A trained method that is guided with the base model's weights beside its own; the artifact stays as it is.

    What was learned is found by looking: the parameters of the U-Net and of the text encoder that are others once the
    method is attached. That nothing else is changed, `check_by_weights` asks the recipe.
    """

    def __init__(self, method: Method, how: WeightGuidance) -> None:
        nn.Module.__init__(self)
        self.method, self.how, self.concept, self.config = method, how, method.concept, method.config
        self._weak: dict[str, Mapping[str, Tensor]] = {}  # network -> name of a parameter -> weight

    @property
    def phrase(self) -> str:
        return self.method.phrase

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        return self.method.condition(base, prompts)

    @contextmanager
    def attach(self, base: BaseModel) -> Iterator[None]:
        omega = self.how.omega if isinstance(self.how, PersonalizationGuidance) else 0.0
        before = {part: dict(network.named_parameters()) for part, network in _networks(base).items()}
        with self.method.attach(base):
            for part, network in _networks(base).items():
                unrounded = base.unrounded if part == "unet" else {}
                changed = (
                    (name, before[part][name], learned)
                    for name, learned in network.named_parameters()
                    if learned is not before[part][name]
                )
                self._weak[part] = {
                    name: between(own, unrounded.get(name, own), learned, omega) for name, own, learned in changed
                }
            try:
                yield
            finally:
                self._weak = {}

    def guided(self, base: BaseModel, prompts: Sequence[str], scale: float, look: Look | None = None) -> Denoiser:
        """See `sampler.Guides`."""
        if isinstance(self.how, ConsistencyGuidance):
            return self._towards_what_was_learned(base, prompts, scale, self.how.scale, look)
        return self._from_weak_weights(base, prompts, scale, look)

    def _from_weak_weights(self, base: BaseModel, prompts: Sequence[str], scale: float, look: Look | None) -> Denoiser:
        """weak(x, "") + scale (learned(x, prompt) - weak(x, "")), weights being W + omega (W_learned - W).

        With omega = 1 this is classifier-free guidance with what was learned.
        """
        said = self.condition(base, prompts)
        with self._weak_in(base):
            empty = self.condition(base, [""] * len(prompts))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            maps, weak_maps = AttentionMaps(latest_only=look is None), AttentionMaps(latest_only=look is None)
            with self._weak_in(base):
                without = base.denoise(x, t, empty(t), weak_maps)
            with_prompt = base.denoise(x, t, said(t), maps)
            if look:
                look(maps.behind(weak_maps))
            return without + scale * (with_prompt - without)

        return denoise

    def _towards_what_was_learned(
        self, base: BaseModel, prompts: Sequence[str], scale: float, further: float, look: Look | None
    ) -> Denoiser:
        """base(x, "") + scale (base(x, class) - base(x, "")) + further (learned(x, prompt) - base(x, class)).

        The base model does not know the concept: it reads the class noun in its place.
        """
        said, named = self.condition(base, prompts), [p.replace(self.phrase, self.concept.class_noun) for p in prompts]
        with self._weak_in(base):
            halves = TextContext.guidance(base.encode([""] * len(prompts)), base.encode(named))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            maps, base_maps = AttentionMaps(latest_only=look is None), AttentionMaps(latest_only=look is None)
            with self._weak_in(base):
                without, of_class = base.denoise(x.repeat(2, 1, 1, 1), t.repeat(2), halves, base_maps).chunk(2)
            with_prompt = base.denoise(x, t, said(t), maps)
            if look:
                first = AttentionMaps()
                first.include(base_maps, slice(0, len(x)))
                look(maps.behind(first))
            return without + scale * (of_class - without) + further * (with_prompt - of_class)

        return denoise

    @contextmanager
    def _weak_in(self, base: BaseModel) -> Iterator[None]:
        """Within it, the networks compute with the weak weights, where the learned ones stood."""
        with ExitStack() as stack:
            for part, network in _networks(base).items():
                stack.enter_context(placed(self._weak[part].items(), network, lambda name, weak, learned: weak))
            yield


def check_by_weights(method: Method, how: WeightGuidance) -> None:
    """Raise InputError unless all that the method changes in the networks, as it is to be sampled, are weights."""
    if not method.config.samples_by_weights or getattr(method.sampling, "lag", False):
        raise InputError(
            f"{how.display_name} needs what was learned to be weights that take the base model's place, which is not "
            f"so for {type(method).__name__} as it was trained and is to be sampled here"
        )


def between(own: Tensor, unrounded: Tensor, learned: Tensor, omega: float) -> Tensor:
    """The weight that lies `omega` of the way from the base model's to the learned one.

    Args:
        own: as the base model holds it; itself the answer where omega is 0.
        unrounded: the same, as the checkpoint has it.
    """
    if not omega:
        return own
    start = unrounded.detach().to(learned.device, torch.float32)
    return torch.lerp(start, learned.detach().float(), omega).to(learned.dtype)


def _networks(base: BaseModel) -> dict[str, Any]:
    return {"unet": base.unet, **base.text_encoders}
