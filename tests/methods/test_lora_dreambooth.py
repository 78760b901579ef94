"""LoRA-DreamBooth adds a low-rank change to every attention projection."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn

from personalize_core.errors import InputError
from personalize_core.methods.lora_dreambooth.method import Config, LoRADreamBooth, LowRank, encoder_layers, unet_layers
from personalize_core.methods.lora_dreambooth.recipe import Target
from personalize_core.methods.shared.layer_modules import attention_projections
from personalize_core.methods.shared.options import LAG
from personalize_core.training.loop import train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, disturbed, equal_bits, predict, snapshot

ALL = get_args(Target)


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: LoRADreamBooth(Config(steps=3, **chosen), base, concept)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_a_change_is_b_a_x():
    change = disturbed(LowRank(6, 5, 2))
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = np.einsum("or,ri,bni->bno", array(change.B), array(change.A), array(x))
    np.testing.assert_allclose(array(change(x)), expected, atol=1e-6)


def test_peft_predicts_the_same_with_the_same_gradients():
    change, layer = disturbed(LowRank(6, 5, 2)), nn.Linear(6, 5)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["0"])
    theirs: Any = get_peft_model(nn.Sequential(layer), config)
    weights = [parameter for name, parameter in theirs.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for weight, ours in zip(weights, (change.A, change.B), strict=True):
            weight.copy_(ours)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    answers = layer(x) + change(x), theirs(x)
    torch.testing.assert_close(*answers, atol=1e-6, rtol=0)
    one = torch.autograd.grad(answers[0].square().sum(), [change.A, change.B])
    other = torch.autograd.grad(answers[1].square().sum(), weights)
    for gradient, their_gradient in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, their_gradient, atol=1e-4, rtol=1e-5)


def test_factors_start_as_pefts_gaussian_does():
    torch.manual_seed(0)
    ours = LowRank(1280, 640, 4)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["0"])
    theirs = dict(get_peft_model(nn.Sequential(nn.Linear(1280, 640)), config).named_parameters())  # type: ignore[arg-type]
    (their_a,) = [parameter for name, parameter in theirs.items() if "lora_A" in name]
    assert abs(ours.A.std() - their_a.std()) < 0.02 and abs(ours.A.std() - 0.25) < 0.02
    assert not ours.B.any()


def test_attached_it_predicts_as_merged_weights_do(make, base, concept):
    method = disturbed(make()).eval()
    context = base.encode(["a photo of <v> dog", "the desert"], concept)
    with method.attach(base):
        attached = predict(base, context)
    layers = attention_projections(base)
    assert len(layers) == len(method.changes) == 8 * len(LAYERS)
    for path, layer in layers.items():
        change = method.changes[path.replace(".", "/")]
        with torch.no_grad():
            layer.weight += change.B @ change.A
    torch.testing.assert_close(predict(base, context), attached, atol=1e-5, rtol=0)


def test_every_target_predicts_as_merged_weights_do(make, base, concept):
    method, prompts = disturbed(make(targets=ALL)).eval(), ["a photo of <v> dog", "the desert"]
    before, t = snapshot(base), torch.tensor([500, 500])
    with method.attach(base):
        context = method.condition(base, prompts)(t)
        attached = predict(base, context)
    assert equal_bits(snapshot(base), before)
    unet, encoder = unet_layers(base, ALL), encoder_layers(base, ALL)
    assert (len(unet), len(encoder)) == (len(LAYERS) * (8 + 2 + 2), 2 * 6)  # two layers in the encoder
    with torch.no_grad():
        for layers, changes in ((unet, method.changes), (encoder, method.encoder_changes)):
            for path, layer in layers.items():
                layer.weight += (changes.of(path).B @ changes.of(path).A).view_as(layer.weight)
    merged = base.encode(prompts, concept)
    torch.testing.assert_close(merged.hidden, context.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(predict(base, merged), attached, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ALL)
def test_each_target_alone_learns_and_acts(target, make, base, images):
    method = make(targets=(target,)).train()
    learned = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    train(method, base, images, 0, lambda row: None)
    assert all(not torch.equal(tensor, learned[name]) for name, tensor in method.state_dict().items())
    with torch.no_grad(), method.eval().attach(base):
        changed = predict(base, method.condition(base, ["a photo of <v> dog"])(torch.tensor([500])))
    untouched = predict(base, base.encode(["a photo of <v> dog"], method.concept))
    assert not torch.equal(changed, untouched)


def test_lag_is_refused_where_the_text_encoder_changes_too(make, base):
    Config(targets=("attention", "feed_forward", "projections")).check(LAG(lag=True))
    with pytest.raises(InputError, match="a change to the text encoder acts everywhere"):
        Config(targets=ALL).check(LAG(lag=True))
    method = make(targets=ALL).eval()
    method.sampling = LAG(lag=True)
    with pytest.raises(InputError, match="acts everywhere"), method.attach(base):
        pass
    with pytest.raises(ValidationError, match="targets names one twice"):
        Config(targets=("attention", "attention"))


@pytest.mark.parametrize("targets", [("attention",), ALL], ids=["attention", "all"])
def test_it_loads_as_a_lora_and_samples_the_same_there(targets, make, base, concept, tmp_path):
    method = disturbed(make(targets=targets)).eval()
    how = method.export(base, tmp_path)
    assert 'pipe.load_lora_weights("pytorch_lora_weights.safetensors")' in how and "'sks dog'" in how
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    check_same(pipe, "a photo of sks dog on the beach", method, base)


def test_it_trains_on_the_concept_alone_or_with_prior_preservation(make, images):
    assert make().batch(images, 2, torch.Generator()).prompts == ["a photo of <v> dog"] * 2
    batch = make(prior_preservation=True).batch(images, 1, torch.Generator())
    assert batch.prompts == ["a photo of <v> dog", "a photo of dog"]
    assert Config().class_images_needed == 0
    assert Config(prior_preservation=True).class_images_needed == 200


def test_the_recipe_is_diffusers():
    """docs/methods.md#lora-dreambooth."""
    c = Config()
    assert (c.rank, c.steps, c.batch_size, c.lr, c.prior_preservation) == (4, 500, 1, 1e-4, False)


@pytest.mark.parametrize(("width", "cheaper"), [(128, True), (136, False)])
def test_a_narrow_layer_takes_the_sum_of_both_weights_to_the_same_values_and_gradients(width, cheaper):
    torch.manual_seed(0)
    layer, change = nn.Linear(width, width).requires_grad_(False), LowRank(width, width, 4)
    change.B.data.normal_()
    assert change.cheaper_summed(layer) == cheaper
    assert not change.cheaper_summed(nn.Linear(8, 8, dtype=torch.bfloat16))
    assert not change.cheaper_summed(nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 5, width, requires_grad=True)
    y, expected = change.summed(layer)(x), layer(x) + change(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    wanted = [x, change.A, change.B]
    for own, other in zip(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3)
