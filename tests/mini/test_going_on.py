"""Stages that go on from the weights that ship."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from personalize_core.mini import autoencoder, diffusion, loop, world
from personalize_core.mini.export import WEIGHTS, export
from personalize_core.mini.networks import to_tensor


@pytest.fixture
def image():
    return to_tensor(world.draw(world.random_scene(np.random.default_rng(0)))[0][None])


def test_the_autoencoder_goes_on_from_the_weights_that_ship(tmp_path, image):
    stage: Any = autoencoder.Refined(batch=2)
    shipped = load_file(WEIGHTS / "base" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, shipped[name].float()) for name, value in stage.network.state_dict().items())
    loop.train(stage, 2, tmp_path)
    with torch.no_grad():
        old, new = (vae.encode(image).latent_dist.mean for vae in (stage.before, stage.average.module))
    assert not torch.equal(old, new)


def test_frozen_latents_are_scaled_and_shifted_and_the_pictures_are_the_same(tmp_path, image):
    stage: Any = autoencoder.Refined(batch=2)
    loop.train(stage, 2, tmp_path)
    autoencoder.freeze(tmp_path)
    frozen: Any = diffusion.AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        latents, settled = (vae.encode(image).latent_dist for vae in (stage.average.module, frozen))
        assert torch.allclose(
            frozen.decode(settled.mean).sample, stage.average.module.decode(latents.mean).sample, atol=1e-4
        )
        scale = settled.std / latents.std
        assert torch.allclose(scale, scale.mean(dim=(0, 2, 3), keepdim=True).expand_as(scale), rtol=1e-3)


def test_the_unet_goes_on_from_the_weights_that_ship_and_other_latents_have_another_name(tmp_path, monkeypatch):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")
    stage: Any = diffusion.Adapted(seed=0, batch=2, work=tmp_path, scenes=4)
    shipped = load_file(WEIGHTS / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for network in (stage.network, stage.average.module):
        assert all(torch.equal(value, shipped[name].float()) for name, value in network.state_dict().items())
    (kept,) = tmp_path.glob("latents_*")
    assert diffusion.fingerprint(stage.vae, 1) not in kept.name
    monkeypatch.setattr(diffusion, "PAIRS", 0.9)
    assert diffusion.fingerprint(stage.vae, 0) not in kept.name
    monkeypatch.undo()
    assert diffusion.fingerprint(stage.vae, 0) in kept.name
    with torch.no_grad():
        stage.vae.post_quant_conv.bias += 1
    assert diffusion.fingerprint(stage.vae, 0) not in kept.name


def test_an_export_takes_the_last_stage_that_has_a_checkpoint(tmp_path):
    assert loop.last(tmp_path, "adapted", "unet") == tmp_path / "unet"
    for stage in ("unet", "adapted"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "checkpoint.safetensors").touch()
        assert loop.last(tmp_path, "adapted", "unet") == tmp_path / stage


def test_what_was_not_recognised_is_drawn_more_often(tmp_path, monkeypatch):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(diffusion, "HARD", {"dog": 3.0})
    stage: Any = diffusion.Adapted(seed=0, batch=2, work=tmp_path, scenes=64)
    dogs = np.array([diffusion.cached_scene(0, n).category == "dog" for n in range(64)])
    stage.batch = 20_000
    expected = 3 * dogs.sum() / (3 * dogs.sum() + (~dogs).sum())
    assert 0 < dogs.sum()
    assert dogs[stage.rows(np.random.default_rng(0))].mean() == pytest.approx(expected, abs=0.015)


def test_no_untrained_network_takes_the_place_of_trained_weights(tmp_path):
    weights = tmp_path / "weights" / "clip"
    weights.mkdir(parents=True)
    (weights / "open_clip_model.safetensors").write_bytes(b"trained")
    with pytest.raises(FileNotFoundError, match="clip holds no checkpoint: train that stage first"):
        export(tmp_path / "work", weights.parent, ["clip"])
    assert (weights / "open_clip_model.safetensors").read_bytes() == b"trained"
