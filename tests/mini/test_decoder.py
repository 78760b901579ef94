"""The decoder goes on learning for latents that stay as they are."""

import numpy as np
import torch

from personalize_core.mini import autoencoder, loop, networks, world
from personalize_core.mini.networks import to_tensor


def test_training_the_decoder_leaves_the_latents_and_changes_what_is_drawn(tmp_path):
    torch.manual_seed(0)
    networks.autoencoder().save_pretrained(tmp_path / "vae")
    stage = autoencoder.Decoder(batch=1, work=tmp_path)
    x = to_tensor(world.draw(world.random_scene(np.random.default_rng(0)))[0][None])

    def latents_and_drawn(vae):
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
            return latents, vae.decode(latents).sample

    before, drawn_before = latents_and_drawn(stage.network)
    loop.train(stage, 3, tmp_path)
    for vae in (stage.network, stage.average.module):
        after, drawn_after = latents_and_drawn(vae)
        assert torch.equal(before, after)
        assert not torch.allclose(drawn_before, drawn_after)
