"""The frozen model itself: text, U-Net, autoencoder and the target of training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.base_model import model as base_model
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.layers import STABLE_DIFFUSION_LAYERS
from personalize_core.methods.interface import Stage
from personalize_core.training.loop import denoising_step
from tests.conftest import LAYERS, layers_of_stable_diffusion, predict, tiny_base, tiny_parts, unpersonalized


def test_nothing_of_it_can_be_trained(base):
    for model in (base.unet, base.text_encoders["text_encoder"], base.vae):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_layers_are_in_the_order_they_run(base):
    """The middle block between down and up."""
    assert base.layers == tuple(base.transformers) == LAYERS


def test_stable_diffusion_has_sixteen_layers():
    """No attention in down 3 and up 0."""
    layers = layers_of_stable_diffusion()
    assert layers[:3] == ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "down_blocks.1.attentions.0"]
    assert (layers[6], len(layers)) == ("mid_block.attentions.0", 16)
    assert len(layers) == STABLE_DIFFUSION_LAYERS
    assert layers[7:10] == [f"up_blocks.1.attentions.{layer}" for layer in range(3)]
    assert layers[-1] == "up_blocks.3.attentions.2"


def test_the_transformer_blocks_run_in_that_order(base, concept):
    ran = []
    by_module = {id(block): layer for layer, block in base.transformers.items()}
    for block in base.transformers.values():
        block.register_forward_hook(lambda module, args, output: ran.append(by_module[id(module)]))
    predict(base, base.encode(["a dog"], concept))
    assert ran == list(LAYERS)


def test_sizes_are_read_from_the_model(base):
    assert (base.vae_scale, base.image_size, base.latent_shape, base.text_width) == (2, 16, (4, 8, 8), 32)


def test_the_text_is_what_the_stock_encoder_says(base):
    parts = tiny_parts()
    ids = parts["tokenizer"](["a photo of sks dog"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = parts["text_encoder"].eval()(ids.input_ids).last_hidden_state
        assert torch.equal(base.encode(["a photo of sks dog"]).hidden, expected)


def test_latents_are_the_autoencoders_scaled_by_its_factor(base):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = tiny_parts()["vae"].eval().encode(pixels).latent_dist
    moments = base.moments(pixels)
    assert moments.shape == (2, 2, 4, 8, 8)
    torch.testing.assert_close(moments[:, 0], posterior.mean * 0.18215, atol=1e-6, rtol=0)
    torch.testing.assert_close(moments[:, 1], posterior.std * 0.18215, atol=1e-6, rtol=0)


def test_images_are_the_autoencoders_in_whole_grey_levels(base):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = tiny_parts()["vae"].eval().decode(latents / 0.18215).sample
    expected = np.round((np.clip(pixels.numpy(), -1, 1) / 2 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    sampled = base.decode(latents)
    assert sampled.shape == (2, 16, 16, 3) and sampled.dtype == torch.uint8
    assert np.abs(sampled.numpy().astype(int) - expected).max() <= 1  # 0.5 may round to either side


def test_black_and_white_survive_as_the_ends_of_the_range(base, monkeypatch):
    ends = torch.tensor([-1.0, 1.0, -3.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    monkeypatch.setattr(base.vae, "decode", lambda latents: type("Decoded", (), {"sample": ends}))
    assert base.decode(torch.zeros(4, 4, 8, 8))[:, 0, 0, 0].tolist() == [0, 255, 0, 255]


def test_a_call_is_only_there_while_the_unet_runs(base, concept):
    seen = []
    base.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(base.call))
    context = base.encode(["a dog"], concept)
    predict(base, context)
    assert seen[0].context is context and seen[0].t.tolist() == [500]
    with pytest.raises(RuntimeError, match="no pass through the U-Net is running"):
        _ = base.call


def test_a_call_is_over_when_the_unet_fails(base, concept):
    def fail(module, args, output):
        raise ZeroDivisionError

    base.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        predict(base, base.encode(["a dog"], concept))
    with pytest.raises(RuntimeError, match="no pass"):
        _ = base.call


def test_a_call_inside_a_call_gives_the_outer_one_back(base, concept):
    context, inner = base.encode(["a dog"], concept), base.encode(["a mug"], concept)
    seen, handles = [], []

    def nested(module, args, output):
        handles[0].remove()
        predict(base, inner)
        seen.append(base.call.context)

    handles.append(base.unet.conv_in.register_forward_hook(nested))
    predict(base, context)
    assert seen == [context]


# -- the target of training -------------------------------------------------------------------------------------


def a_step(prediction_type, images, concept):
    base = tiny_base(prediction_type=prediction_type)
    stage = Stage("any", 1, 3, [])
    with torch.no_grad():
        return base, denoising_step(unpersonalized(base, concept), base, images, stage, seed=0, index=0)


def test_another_prediction_type_changes_only_the_target(images, concept):
    _, noise = a_step("epsilon", images, concept)
    _, velocity = a_step("v_prediction", images, concept)
    for name in ("x_t", "t", "prediction"):
        assert torch.equal(getattr(noise, name), getattr(velocity, name)), name
    assert not torch.equal(noise.target, velocity.target)


def test_noise_and_velocity_are_those_of_the_formulae(images, concept):
    """x_t = a z + s eps; the target is eps, or v = a eps - s z (Salimans & Ho 2022)."""
    for prediction_type in ("epsilon", "v_prediction"):
        base, step = a_step(prediction_type, images, concept)
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        kept = np.cumprod(1 - betas)[step.t.numpy()].reshape(-1, 1, 1, 1)
        a, s = np.sqrt(kept), np.sqrt(1 - kept)
        z, x_t = step.batch.latents.double().numpy(), step.x_t.double().numpy()
        eps = (x_t - a * z) / s
        expected = eps if prediction_type == "epsilon" else a * eps - s * z
        np.testing.assert_allclose(step.target.numpy(), expected, atol=1e-3)  # float32 noise at small t


def test_a_model_that_predicts_something_else_is_refused(concept):
    base = tiny_base(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample' is neither 'epsilon' nor 'v_prediction'"):
        base.target(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([3]))


def test_in_bfloat16_it_predicts_nearly_the_same_in_float32(base, concept):
    half = tiny_base(base.unet.config.use_linear_projection, dtype=torch.bfloat16)
    expected = predict(base, base.encode(["a dog"], concept))
    answer = predict(half, half.encode(["a dog"], concept))
    assert answer.dtype == torch.float32
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.text_encoders["text_encoder"].parameters()} == {torch.float32}
    assert (answer - expected).abs().mean() < 0.03 * expected.abs().mean()  # bfloat16 keeps 8 bits: 0.4 % a step


def test_a_hook_finds_the_same_call_when_the_unet_is_computed_again(base, concept):
    """With gradient checkpointing a block runs twice, the second time in the backward pass."""
    context = base.encode(["a photo of <v> dog", "the desert"], concept)
    scale = torch.ones((), requires_grad=True)
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 800])
    block: Any = base.transformers["down_blocks.0.attentions.0"].transformer_blocks[0]
    seen: list[list[int]] = []

    def by_timestep(module, args, output):
        seen.append(base.call.t.tolist())
        return output * scale * base.call.t.view(-1, 1, 1) / 1000

    def gradient() -> torch.Tensor:
        with hooked(block.attn2.to_out[0].register_forward_hook(by_timestep)):
            prediction = base.denoise(x_t, t, context)
            (found,) = torch.autograd.grad(prediction.square().sum(), scale)
        return found

    plain = gradient()
    with base.recomputing():
        again = gradient()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert seen == [[10, 800]] * 3  # once plain, twice checkpointed
    with pytest.raises(RuntimeError, match="no pass through the U-Net is running"):
        _ = base.call


# -- memory ----------------------------------------------------------------------------------------------------


def test_the_autoencoder_sees_few_pixels_at_once_and_no_image_depends_on_the_others(base, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    monkeypatch.setattr(base_model, "PIXELS_AT_ONCE", 2 * 16 * 16 + 1)
    latents, pixels = (torch.randn(5, *shape, generator=generator) for shape in ((4, 8, 8), (3, 16, 16)))
    seen: list[int] = []
    for part in (base.vae.encoder, base.vae.decoder):
        part.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images, moments = base.decode(latents), base.moments(pixels)
    assert seen == [2, 2, 1] * 2
    assert torch.equal(images, torch.cat([base.decode(one[None]) for one in latents]))
    torch.testing.assert_close(moments, torch.cat([base.moments(one[None]) for one in pixels]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("side", "at_once"), [(64, 288), (512, 4), (768, 2), (2048, 1)])
def test_of_small_images_the_autoencoder_takes_more_at_once(base, monkeypatch, side, at_once):
    """Of 768 pixels two: eight would need 13.5 GiB of a graphics card."""
    seen: list[int] = []

    def decode(latents):
        seen.append(len(latents))
        return type("Decoded", (), {"sample": torch.zeros(len(latents), 3, 2, 2)})

    monkeypatch.setattr(base.vae, "decode", decode)
    base.decode(torch.zeros(1, 4, side // base.vae_scale, 1).expand(300, -1, -1, side // base.vae_scale))
    assert seen[0] == at_once and sum(seen) == 300


def test_in_bfloat16_the_weights_are_known_as_the_checkpoint_has_them():
    full, half = tiny_base(), tiny_base(dtype=torch.bfloat16)
    assert not full.unrounded
    weights = dict(full.unet.named_parameters())
    assert half.unrounded.keys() == weights.keys()
    assert all(torch.equal(half.unrounded[name], weight) for name, weight in weights.items())
    assert any(not torch.equal(half.unet.get_parameter(name).float(), weight) for name, weight in weights.items())


def test_the_text_is_the_same_where_the_text_encoder_is_computed_again(base, concept):
    found = []
    for recomputing in (nullcontext(), base.recomputing()):
        vector = base.rare_embedding().requires_grad_()
        with recomputing:
            hidden = base.encode(["a photo of <v> dog"], concept, vector).hidden
            found.append((hidden, *torch.autograd.grad(hidden.pow(2).sum(), vector)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
