"""Where a change may act: above the median of what one concept is looked at, and not where another is more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.methods import METHOD_NAMES, method_class, recipe_class
from personalize_core.methods.interface import Method, SeesImages
from personalize_core.methods.recipe import NOTHING_INSIDE
from personalize_core.methods.shared import lag as localized_module
from personalize_core.methods.shared.lag import above_median, belongs, localized
from personalize_core.methods.shared.options import LAG
from tests.conftest import LAYERS, disturbed, predict, tiny_base


def test_about_half_of_the_locations_are_inside():
    attention = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    assert above_median(attention).sum(dim=1).tolist() == [32] * 5


def test_ties_with_the_median_are_outside():
    assert above_median(torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0]])).tolist() == [[False, False, False, False, True]]
    assert not above_median(torch.zeros(2, 9)).any()
    assert not above_median(torch.tensor([[0.7]])).any()


def test_each_row_has_its_own_median():
    attention = torch.tensor([[0.1, 0.2, 0.3], [10.0, 20.0, 30.0]])
    assert above_median(attention).tolist() == [[False, False, True]] * 2


def test_a_location_that_two_concepts_want_goes_to_the_stronger():
    """Against a loop over the rule: above its own median, and relatively above every other, the first on a tie."""
    draws = torch.Generator().manual_seed(1)
    attention = torch.stack([torch.randperm(49, generator=draws) % 7 for _ in range(6)]).view(3, 2, 49).float()
    scales = torch.tensor([1 / 128, 1 / 2, 1 / 32]).view(3, 1, 1)  # one that is looked at everywhere wins nothing by it
    found = [belongs(list(attention * scales), place).numpy() for place in range(3)]
    looked = attention.double().numpy()  # each with one mean, so that these are relative, and ties are exact
    for row in range(2):
        for n in range(49):
            wanted = looked[:, row, n] > np.sort(looked[:, row], axis=1)[:, 24]
            owner = int(np.argmax(looked[:, row, n]))  # of equals the first
            for place in range(3):
                assert found[place][row, n] == (wanted[place] and owner == place)
    assert all(part.any() for part in found)
    assert not (found[0] & found[1]).any() and not (found[0] & found[2]).any() and not (found[1] & found[2]).any()


def test_a_concept_that_is_alone_competes_with_nobody():
    attention = torch.rand(2, 25, generator=torch.Generator().manual_seed(2))
    assert torch.equal(belongs([attention], 0), above_median(attention))
    unseen = torch.zeros(2, 25)
    assert torch.equal(belongs([attention, unseen], 0), above_median(attention))
    assert not belongs([attention, unseen], 1).any()


def test_outside_not_one_bit_changes_whatever_the_axes():
    inside = torch.tensor([[True, False, False, True]])
    original, change = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    answer = localized(inside, original, original + change)
    expected = np.where(inside.view(2, 2).numpy(), original.numpy() + change.numpy(), original.numpy())
    assert np.array_equal(answer.numpy(), expected)
    rows = localized(inside, original.flatten(2).mT, (original + change).flatten(2).mT)
    assert torch.equal(rows.mT.reshape(1, 3, 2, 2), answer)


# -- every method that LAG can confine -----------------------------------------------------------------------------

PROMPT = "a photo of a {} in the jungle"
VARIED = {  # what acts in other places than the method's default does
    "personalized_residuals": [{"targets": ("to_k", "to_v")}, {"targets": ("proj_in", "proj_out")}],
    "custom_diffusion": [{"trained": "attn2"}],
    "oft": [{"rescaled": True}],
}
CONFINABLE = [name for name in METHOD_NAMES if issubclass(recipe_class(name).Sampling, LAG)]
CASES = [(name, chosen) for name in CONFINABLE for chosen in ({}, *VARIED.get(name, []))]
MERGING = tuple(map(method_class, ("lora_dreambooth", "oft", "dco", "personalized_residuals")))  # sampling without LAG
of_confinable = pytest.mark.parametrize(("name", "chosen"), CASES, ids=str)


def learned(name: str, chosen: dict[str, Any], base: BaseModel, concept: Concept, seed: int = 11) -> Any:
    kind: Any = method_class(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = disturbed(kind(kind.Config(**chosen), base, concept), seed=seed).eval()
    if hasattr(method, "references"):
        method.references = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(5))
    return method


def answer(method: Any, base: BaseModel, context: TextContext, **sampling) -> torch.Tensor:
    method.sampling = method.config.Sampling(**sampling)
    with method.attach(base):
        return predict(base, context)


@contextmanager
def beside(method: Any, base: BaseModel) -> Iterator[None]:
    """Attached with the changes beside the weights though without LAG, where some methods merge them."""
    with mock.patch.object(sys.modules[type(method).__module__], "apart", lambda method: True, create=True):
        attachment = method.attach(base)
    with attachment:
        yield


def guided(method: Any, base: BaseModel) -> TextContext:
    """Both halves of guidance, of a prompt with the concept and one without."""
    prompts, t = [method.say(PROMPT), "red mug on the beach"], torch.tensor([500, 500])
    with torch.no_grad():
        return TextContext.guidance(method.condition(base, ["", ""])(t), method.condition(base, prompts)(t))


def with_region(monkeypatch, value: bool) -> None:
    monkeypatch.setattr(
        localized_module, "above_median", lambda attention: torch.full_like(attention, value, dtype=torch.bool)
    )


def test_lag_is_there_for_every_method_that_acts_within_the_transformers_alone():
    """The others train the text alone, or weights between the transformers."""
    assert {"personalized_residuals", "lora_dreambooth", "oft", "custom_diffusion", "vico"} <= set(CONFINABLE)
    assert not {"base_model", "textual_inversion", "neti", "xti", "dreambooth", "ti_db", "core"} & set(CONFINABLE)


@dataclass(frozen=True)
class Predictions:
    """What several tests compare with, computed once: of one context by the base model, and by a method without LAG,
    merged or not, and with it."""

    base: BaseModel
    method: Any
    context: TextContext
    untouched: torch.Tensor
    plain: torch.Tensor
    beside: torch.Tensor
    confined: torch.Tensor


@pytest.fixture(scope="module", params=[False, True], ids=["convolutional", "linear"])
def linear(request) -> bool:
    return request.param


@pytest.fixture(scope="module", params=CASES, ids=str)
def predictions(linear, request) -> Predictions:
    base, (name, chosen) = tiny_base(linear), request.param
    method = learned(name, chosen, base, Concept("v", "<v>", "dog"))
    context = guided(method, base)
    plain = answer(method, base, context)
    with beside(method, base):
        unmerged = predict(base, context)
    confined = answer(method, base, context, lag=True)
    return Predictions(base, method, context, predict(base, context), plain, unmerged, confined)


def test_a_region_of_everything_is_plain_sampling(predictions, monkeypatch):
    """To the bit with the changes beside the weights, as LAG has them; to rounding where plain sampling merges."""
    p = predictions
    with_region(monkeypatch, True)
    everywhere = answer(p.method, p.base, p.context, lag=True)
    assert torch.equal(everywhere, p.beside)
    rounding = 1e-5 * p.plain.abs().max() if isinstance(p.method, MERGING) else 0
    assert (everywhere - p.plain).abs().max() <= rounding
    assert (p.confined - p.plain).abs().max() > 1e-4


def test_a_region_of_nothing_is_the_base_model(predictions, monkeypatch):
    """To the bit, but for ViCo, whose reference rows stand beside: a larger batch is rounded differently."""
    p = predictions
    with_region(monkeypatch, False)
    nowhere = answer(p.method, p.base, p.context, lag=True)
    torch.testing.assert_close(nowhere, p.untouched, atol=1e-5 if hasattr(p.method, "references") else 0, rtol=0)
    assert (p.confined - p.untouched).abs().amax() > 1e-4


def test_an_image_without_the_concept_is_left_to_the_base_model(predictions):
    p = predictions
    torch.testing.assert_close(p.confined[[1, 3]], p.untouched[[1, 3]], atol=1e-5, rtol=0)
    assert ((p.confined - p.untouched)[[0, 2]].abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    off, full = (answer(p.method, p.base, p.context, lag=True, lag_unconditional=how) for how in ("off", "full"))
    assert not torch.equal(off[0], full[0])


ELSEWHERE = ("vico", {}), ("personalized_residuals", {})  # confined where they act; tested in their own files
WITHIN = [case for case in CASES if case not in ELSEWHERE]


def watched(base: BaseModel, attach: Callable, context: TextContext) -> dict[str, tuple]:
    """What enters each transformer in one pass, and what leaves it after all hooks."""
    seen: dict[str, tuple] = {}
    with attach(), ExitStack() as stack:
        for layer, block in base.transformers.items():

            def look(module, args, kwargs, output, layer=layer):
                seen[layer] = args, kwargs, output[0]

            stack.enter_context(hooked(block.register_forward_hook(look, with_kwargs=True)))
        predict(base, context)
    return seen


def again(base: BaseModel, layer: str, args: tuple, kwargs: dict) -> tuple[np.ndarray, np.ndarray]:
    """A transformer's answer to what it was given, (B, N, m), and its cross-attention map, (B, heads, N, L)."""
    call = replace(kwargs["cross_attention_kwargs"]["call"], maps=AttentionMaps())
    with torch.no_grad(), mock.patch.object(base, "_call", call):  # for hooks that ask for the timestep
        (output,) = base.transformers[layer](*args, **kwargs | {"cross_attention_kwargs": {"call": call}})
        return output.flatten(2).mT.numpy(), call.maps[layer].double().numpy()


@pytest.mark.parametrize(("name", "chosen"), WITHIN, ids=str)
def test_each_transformer_computes_eq_3_as_a_plain_loop_computes_it(name, chosen, base, concept):
    """f where the run without the change looks less than the median at the concept, f' elsewhere."""
    method = learned(name, chosen, base, concept)
    context = guided(method, base)
    method.sampling = method.config.Sampling(lag=True)
    seen = watched(base, lambda: method.attach(base), context)
    method.sampling = method.config.Sampling()
    words = context.concept.numpy()
    inside = 0
    for layer, (args, kwargs, output) in seen.items():
        f, looked = again(base, layer, args, kwargs)
        with beside(method, base):
            changed, _ = again(base, layer, args, kwargs)
        found = output.flatten(2).mT.numpy()
        for row, partner in enumerate([2, 3, 2, 3]):  # the prompt-free half takes its partner's region
            attention = looked[partner][..., words[partner]].sum(axis=-1).mean(axis=0)
            mask = attention > np.sort(attention)[(len(attention) - 1) // 2]
            assert np.array_equal(found[row][mask], changed[row][mask]), (layer, row)
            assert np.array_equal(found[row][~mask], f[row][~mask]), (layer, row)
            inside += mask.sum()
            assert row in (1, 3) or not mask.any() or not np.array_equal(changed[row][mask], f[row][mask])
    assert inside


@of_confinable
def test_the_maps_of_a_pass_are_those_of_the_run_without_the_change(name, chosen, base, concept):
    """The first transformer is given what the base model's is given, and looks where that looks."""
    method = learned(name, chosen, base, concept)
    context = guided(method, base)
    method.sampling = method.config.Sampling(lag=True)
    noise, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.full((4,), 500)
    maps, untouched = AttentionMaps(), AttentionMaps()
    with torch.no_grad():
        base.denoise(noise, t, context, untouched)
        with method.attach(base):
            base.denoise(noise, t, context, maps)
    assert {*LAYERS} <= set(maps)
    torch.testing.assert_close(maps[LAYERS[0]], untouched[LAYERS[0]], atol=1e-6, rtol=0)


@of_confinable
def test_training_ignores_lag(name, chosen, base, concept):
    method = learned(name, chosen, base, concept)
    prompts = [method.say("a photo of a {}")] * 2
    with torch.no_grad():
        context = method.condition(base, prompts)(torch.tensor([500, 500]))
    method.train()
    if name == "vico":
        method._sampled = method.references.expand(2, -1, -1, -1)
    assert torch.equal(answer(method, base, context, lag=True), answer(method, base, context))


@of_confinable
def test_lag_works_where_the_unet_runs_in_bfloat16(name, chosen, concept):
    base = tiny_base(dtype=torch.bfloat16)
    method = learned(name, chosen, base, concept)
    context = guided(method, base)
    found = answer(method, base, context, lag=True)
    assert found.isfinite().all() and not torch.equal(found, predict(base, context))


def test_what_lag_is_to_do_without_lag_is_refused():
    with pytest.raises(ValidationError, match="says what lag does, which is off; add `lag: true`"):
        LAG(lag_unconditional="full")


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in CONFINABLE])
def test_a_method_that_lag_cannot_confine_says_why(name, base, concept):
    """A method that changes nothing inside the U-Net has the common reason; any other gives its own."""
    kind: Any = method_class(name)
    inside = kind.attach is not Method.attach
    assert (recipe_class(name)().lacks["lag"] != NOTHING_INSIDE["lag"]) == inside
    if inside:  # and it is true: weights outside of the transformers are tuned, or the concept images act by themselves
        method = kind(kind.Config(), base, concept)
        tuned = [n for n, _ in method.named_parameters() if "unet" in n]
        assert any(".attentions." not in n.replace("/", ".") for n in tuned) != isinstance(method, SeesImages)
