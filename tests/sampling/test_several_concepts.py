"""Several artifacts in one image: each acts where its own concept is looked at, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.base_model.attention import Call
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods.dreambooth.method import Config as DreamBoothConfig
from personalize_core.methods.dreambooth.method import DreamBooth
from personalize_core.methods.lora_dreambooth.method import Config as LoRAConfig
from personalize_core.methods.lora_dreambooth.method import LoRADreamBooth
from personalize_core.methods.oft.method import OFT
from personalize_core.methods.oft.method import Config as OFTConfig
from personalize_core.methods.personalized_residuals.method import Config, PersonalizedResiduals
from personalize_core.methods.shared.lag import localized, region
from personalize_core.methods.shared.options import LAG
from personalize_core.methods.textual_inversion.method import Config as TextualInversionConfig
from personalize_core.methods.textual_inversion.method import TextualInversion
from personalize_core.methods.vico.method import Config as ViCoConfig
from personalize_core.methods.vico.method import ViCo
from personalize_core.sampling.several_concepts import Together
from tests.conftest import LAYERS, disturbed, predict, sample_latents

FIRST, SECOND = Concept("v", "<v>", "dog"), Concept("w", "<w>", "teddy bear")
PROMPT = "a photo of <v> dog beside a <w> teddy bear"


def learned(base, concept, seed=11, **config) -> Any:
    return disturbed(PersonalizedResiduals(Config(**config), base, concept), seed=seed).eval()


@pytest.fixture
def together(base) -> Any:
    return Together([learned(base, FIRST, 3), learned(base, SECOND, 4)], base).eval()


def guided(method, base, prompts) -> TextContext:
    t = torch.tensor([500])
    empty, full = method.condition(base, [""] * len(prompts))(t), method.condition(base, prompts)(t)
    return TextContext.guidance(empty, full)


def test_each_concept_is_said_as_its_method_says_it(together):
    assert together.say("a photo of <v> beside a <w>") == PROMPT
    assert together.say(PROMPT) == PROMPT
    with pytest.raises(InputError, match="does not mention the concept 'w'"):
        together.say("a photo of <v>")


def test_the_text_is_what_stable_diffusion_reads_of_two_rare_words(together, base):
    context = together.condition(base, [PROMPT])(torch.tensor([1]))
    assert torch.equal(context.hidden, base.encode(["a photo of sks dog beside a sks teddy bear"]).hidden)


def test_each_concept_has_its_own_words(together, base):
    first, second = together.condition(base, [PROMPT])(torch.tensor([1])).concepts[:, 0]
    assert not (first & second).any()
    one, other = base.encode([PROMPT.replace("<w>", "sks")], FIRST), base.encode([PROMPT.replace("<v>", "sks")], SECOND)
    assert torch.equal(first, one.concept[0]) and torch.equal(second, other.concept[0])
    assert int(first.sum()) >= 2 and int(second.sum()) >= 3  # "teddy bear" has two tokens at least


def test_no_location_has_two_owners_and_both_halves_of_guidance_agree(together, base):
    masks: dict[str, list[torch.Tensor]] = {}

    def look(layer: str) -> Any:
        """As each layer has run: then its maps are there."""

        def keep(*of_layer: Any) -> None:
            masks[layer] = [region(base.call, layer, place, "reuse") for place in (0, 1)]

        return base.transformers[layer].proj_out.register_forward_hook(keep)

    handles = [look(layer) for layer in LAYERS]
    predict(base, guided(together, base, [PROMPT, PROMPT.replace("beside", "behind")]))
    for handle in handles:
        handle.remove()
    assert masks.keys() == set(LAYERS)
    for layer, (first, second) in masks.items():
        assert not (first & second).any(), layer
        for mask in (first, second):
            assert torch.equal(mask[:2], mask[2:])
    assert all(mask.any() for mask in masks[LAYERS[0]])


def test_where_one_part_alone_would_act_both_act_when_the_other_learned_nothing(base):
    """A part whose residuals are zero changes no image but for the locations that it takes from the other."""
    zero = PersonalizedResiduals(Config(), base, SECOND).eval()
    pair: Any = Together([learned(base, FIRST), zero], base).eval()
    context = guided(pair, base, [PROMPT])
    untouched = predict(base, context)
    with pair.attach(base):
        answer = predict(base, context)
    assert not torch.equal(answer, untouched)
    with zero.attach(base):
        assert torch.equal(predict(base, context), untouched)


def test_the_order_of_the_parts_changes_no_image(base):
    """Ties apart, which random attention has none of."""
    parts = [learned(base, FIRST, 3), learned(base, SECOND, 4)]
    images = [sample_latents(Together(order, base), base, [PROMPT]) for order in (parts, parts[::-1])]
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=0)


KINDS = {"residuals": (PersonalizedResiduals, Config), "lora": (LoRADreamBooth, LoRAConfig), "oft": (OFT, OFTConfig)}
MIXED = [("lora", "lora"), ("residuals", "lora"), ("lora", "residuals"), ("oft", "lora")]


def learned_by(kind: str, base, concept, seed: int) -> Any:
    made, config = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return disturbed(made(config(), base, concept), seed=seed).eval()


@pytest.mark.parametrize("kinds", MIXED, ids="+".join)
def test_parts_of_any_method_that_can_be_confined_act_each_in_its_own_region(kinds, base):
    """Every transformer answers as each part alone would in that part's region, and as the base model elsewhere."""
    parts = [learned_by(kinds[0], base, FIRST, 3), learned_by(kinds[1], base, SECOND, 4)]
    pair, layer = Together(parts, base).eval(), LAYERS[0]
    context, seen = guided(pair, base, [PROMPT]), []
    with pair.attach(base):
        look = base.transformers[layer].register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args, kwargs, output[0], region_of_each(base, layer))),
            with_kwargs=True,
        )
        with hooked(look):
            predict(base, context)
    ((args, kwargs, output, regions),) = seen
    call = {"cross_attention_kwargs": {"call": Call(torch.tensor([500] * 2), context)}}
    with torch.no_grad():
        expected = base.transformers[layer](*args, **kwargs | call)[0]
        for part, inside in zip(parts, regions, strict=True):
            part.sampling = LAG()
            with part.attach(base):
                changed = base.transformers[layer](*args, **kwargs | call)[0]
            assert inside.any() and not torch.equal(changed, expected)
            expected = localized(inside, expected, changed)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)  # alone, a part is merged into the weights
    assert not (regions[0] & regions[1]).any()


def region_of_each(base, layer: str) -> list[torch.Tensor]:
    return [region(base.call, layer, place, "reuse") for place in (0, 1)]


def test_a_image_of_both_is_neither_ones_alone(together, base):
    both = sample_latents(together, base, [PROMPT])
    for part in together.parts:
        context = guided(together, base, [PROMPT])
        with part.attach(base):
            alone = predict(base, context)
        with together.attach(base):
            assert not np.array_equal(predict(base, context), alone)
    assert both.isfinite().all()


def test_the_base_model_comes_out_as_it_went_in(together, base):
    before = predict(base, base.encode([PROMPT], FIRST))
    sample_latents(together, base, [PROMPT])
    assert torch.equal(predict(base, base.encode([PROMPT], FIRST)), before)


def test_what_cannot_share_a_image_is_refused_in_a_sentence(base):
    one = learned(base, FIRST)
    with pytest.raises(InputError, match="need two artifacts at least"):
        Together([one], base)
    with pytest.raises(InputError, match="v is named twice"):
        Together([one, learned(base, FIRST)], base)
    whole = DreamBooth(DreamBoothConfig(prior_preservation=False), base, SECOND)
    with pytest.raises(InputError, match="DreamBooth cannot share .*: it changes the whole U-Net"):
        Together([one, whole], base)
    words = TextualInversion(TextualInversionConfig(), base, SECOND)
    with pytest.raises(InputError, match="TextualInversion cannot share .*: nothing that it learns acts inside the"):
        Together([one, words], base)
    for part in (learned(base, SECOND, train_embedding=True), ViCo(ViCoConfig(), base, SECOND)):
        with pytest.raises(InputError, match="'w' has learned an embedding .* takes a method that learns none"):
            Together([one, part], base)


def test_sampling_options_of_the_parts_are_those_of_lag(together):
    assert [part.sampling for part in together.parts] == [LAG(lag=True)] * 2
    assert [part.place for part in together.parts] == [0, 1]
