"""Guidance with the base model's weights beside the learned ones: every method that samples by weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from personalize_core.base_model.model import BaseModel
from personalize_core.errors import InputError
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.options import ConsistencyGuidance, PersonalizationGuidance, WeightGuidance
from personalize_core.sampling.sampler import denoiser, initial_noise, make_sampler, ready, sample
from personalize_core.sampling.weight_guidance import WeightGuided, between, check_by_weights
from tests.conftest import disturbed, equal_bits, sample_latents, snapshot, tiny_base
from tests.every_method.cases import ALL, CONCEPT, Case, of_all

BY_WEIGHTS = [
    case
    for case in ALL
    if case.make(case.base(), CONCEPT).config.samples_by_weights
    and (not case.chosen or ("train_text_encoder", True) in case.chosen)
    and case.kind == "convolutional"
]
of_weights = pytest.mark.parametrize("case", BY_WEIGHTS, ids=str)
T = torch.tensor([700, 300])


def learned(case: Case, base: BaseModel) -> Method:
    return disturbed(case.make(base, CONCEPT)).eval()


@cache
def _base() -> BaseModel:
    """One for all cases, since no method may change a bit of it."""
    return tiny_base()


def hooks(base: BaseModel) -> int:
    """Everything besides weights by which a network may compute something else."""
    modules: list[Any] = [*base.unet.modules(), *base.text_encoders.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


def weights(base: BaseModel) -> dict[str, torch.Tensor]:
    parts = {"unet": base.unet, "text_encoder": base.text_encoders}
    return {f"{part}.{name}": tensor for part, network in parts.items() for name, tensor in network.named_parameters()}


@of_all
def test_a_recipe_says_whether_all_that_sampling_changes_are_weights(case):
    base = _base()
    method, before, untouched = learned(case, base), weights(base), hooks(base)
    with ready(method, base):
        changed = any(tensor is not before[name] for name, tensor in weights(base).items())
        other = hooks(base) > untouched
    assert method.config.samples_by_weights == (changed and not other)


class Naive:
    """Whole copies of the base model with the weights written into them, each called for one prompt at a time."""

    def __init__(self, base: BaseModel, method: Method, omega: float) -> None:
        with ready(method, base):
            learned = {name: tensor.detach().double() for name, tensor in weights(base).items()}
        self.own, self.weak, self.tuned = (copy.deepcopy(base) for _ in range(3))
        with torch.no_grad():
            for name, start in weights(base).items():
                weights(self.tuned)[name].copy_(learned[name])
                weights(self.weak)[name].copy_((1 - omega) * start.double() + omega * learned[name])

    def said(self, base: BaseModel, x: torch.Tensor, prompts: list[str], embedding: torch.Tensor | None = None):
        with torch.no_grad():
            rows = [
                base.denoise(x[[row]], T[[row]], base.encode([prompt], CONCEPT, embedding))
                for row, prompt in enumerate(prompts)
            ]
        return torch.cat(rows)


def embedding_of(method: Any) -> torch.Tensor | None:
    found = getattr(method, "embedding", None)
    return found.vector if found is not None else None


def guided(method: Method, base: BaseModel, how: WeightGuidance, prompts: list[str], x: torch.Tensor, scale: float):
    wrapped = WeightGuided(method, how)
    with ready(wrapped, base):
        return denoiser(wrapped, base, prompts, scale)(x, T)


@of_weights
@pytest.mark.parametrize("omega", [0.0, 0.3])
def test_personalization_guidance_starts_from_weights_between(case, omega):
    base = case.base()
    method, x = learned(case, base), initial_noise(base, 0, [(0, 0), (1, 0)])
    prompts = [method.say("a photo of {}"), method.say("a red {} on the beach")]
    naive = Naive(base, method, omega)
    without = naive.said(naive.weak, x, ["", ""])
    prompted = naive.said(naive.tuned, x, prompts, embedding_of(method))
    found = guided(method, base, PersonalizationGuidance(omega=omega), prompts, x, 3.0)
    torch.testing.assert_close(found, without + 3.0 * (prompted - without), atol=2e-4, rtol=1e-4)


@of_weights
def test_consistency_guidance_goes_from_the_base_models_guidance_to_what_was_learned(case):
    base = case.base()
    method, x = learned(case, base), initial_noise(base, 0, [(0, 0), (1, 0)])
    templates = ["a photo of {}", "a red {} on the beach"]
    prompts = [method.say(template) for template in templates]
    naive = Naive(base, method, 0.0)
    without = naive.said(naive.own, x, ["", ""])
    of_class = naive.said(naive.own, x, [template.replace("{}", "dog") for template in templates])
    prompted = naive.said(naive.tuned, x, prompts, embedding_of(method))
    expected = without + 3.0 * (of_class - without) + 2.0 * (prompted - of_class)
    found = guided(method, base, ConsistencyGuidance(scale=2.0), prompts, x, 3.0)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@of_weights
def test_with_the_learned_weights_it_is_the_usual_guidance_and_between_them_it_is_not(case):
    base = case.base()
    method = learned(case, base)
    prompts = [method.say("a photo of {}")]
    usual = sample_latents(method, base, prompts)
    with_learned = sample_latents(WeightGuided(method, PersonalizationGuidance(omega=1.0)), base, prompts)
    torch.testing.assert_close(with_learned, usual, atol=2e-3, rtol=1e-3)
    half = sample_latents(WeightGuided(method, PersonalizationGuidance(omega=0.5)), base, prompts)
    assert (half - usual).abs().max() > 1e-3


@of_weights
@pytest.mark.parametrize("how", [PersonalizationGuidance(omega=0.5), ConsistencyGuidance()])
def test_base_model_and_method_come_out_as_they_went_in_and_sample_the_same_again(case, how):
    base = case.base()
    method = learned(case, base)
    before, state = snapshot(base), {name: tensor.clone() for name, tensor in method.state_dict().items()}
    prompts = [method.say("a photo of {}")]
    first = sample_latents(WeightGuided(method, how), base, prompts)
    assert equal_bits(snapshot(base), before) and equal_bits(dict(method.state_dict()), state)
    assert torch.equal(sample_latents(WeightGuided(method, how), base, prompts), first)


def test_weights_between_are_mixed_from_the_checkpoints_and_rounded_once():
    """In bfloat16 the base model's own weights have lost digits."""
    own = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    unrounded, tuned = torch.tensor([1.0031, 2.0]), torch.tensor([1.0156, 3.0], dtype=torch.bfloat16)
    found = between(own, unrounded, tuned, 0.25)
    assert torch.equal(found, torch.tensor([0.75 * 1.0031 + 0.25 * 1.015625, 2.25]).bfloat16())
    assert between(own, unrounded, tuned, 0.0) is own


@pytest.mark.parametrize("how", [PersonalizationGuidance(omega=0.4), ConsistencyGuidance(scale=1.5)])
def test_watching_changes_no_bit_and_sees_the_prompt_free_rows_first(how):
    base = tiny_base()
    case = next(case for case in BY_WEIGHTS if case.name == "dreambooth")
    method, x, seen = learned(case, base), initial_noise(base, 0, [(0, 0), (1, 0)]), []
    wrapped, prompts = WeightGuided(method, how), [method.say("a photo of {}")] * 2
    with ready(wrapped, base):
        watched = denoiser(wrapped, base, prompts, 3.0, seen.append)(x, T)
        assert torch.equal(watched, denoiser(wrapped, base, prompts, 3.0)(x, T))
        layer = base.layers[0]
        alone: list[Any] = []
        denoiser(method, base, prompts, 3.0, alone.append)(x, T)
    (maps,), (of_usual,) = seen, alone
    assert set(maps) == set(base.layers) and len(maps[layer]) == 4
    torch.testing.assert_close(maps[layer][2:], of_usual[layer][2:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps[layer][:2], of_usual[layer][:2], atol=1e-4)  # by other weights


def test_what_changes_more_than_weights_is_refused():
    base = tiny_base()
    method = learned(Case("oft", "convolutional"), base)
    check_by_weights(method, PersonalizationGuidance())
    method.sampling = method.config.Sampling(lag=True)
    with pytest.raises(InputError, match="personalization guidance needs what was learned to be weights"):
        check_by_weights(method, PersonalizationGuidance())
    with pytest.raises(InputError, match="consistency guidance needs .* TLoRA as it was trained"):
        check_by_weights(learned(Case("t_lora", "convolutional"), base), ConsistencyGuidance())


def test_a_whole_image_is_sampled_by_every_sampler():
    base = tiny_base()
    method = WeightGuided(learned(Case("oft", "convolutional"), base), ConsistencyGuidance())
    noise, prompts = initial_noise(base, 0, [(0, 0)]), [method.say("a photo of {}")]
    images = [
        sample(method, base, prompts, noise, make_sampler(name, base), 3, 4.0) for name in ("ddim", "dpm-solver++")
    ]
    assert all(image.isfinite().all() for image in images) and not torch.equal(*images)
