"""Images from the miniature while it trains, and what both stage and gates ask of it."""

from __future__ import annotations

import torch
from torch import Tensor

from personalize_core.mini.networks import scheduler, to_images
from personalize_core.mini.text import tokens


@torch.no_grad()
def sample(
    vae, words, text_encoder, unet, prompts: list[str], *, steps: int = 25, guidance: float = 4.0, seed: int = 0
):
    """DDIM with classifier-free guidance; one generator per image. (B, 64, 64, 3) uint8."""
    device = next(unet.parameters()).device
    said, empty = (
        text_encoder(tokens(words, texts).to(device)).last_hidden_state for texts in (prompts, [""] * len(prompts))
    )
    return sampled_from(vae, unet, said, empty, steps=steps, guidance=guidance, seed=seed)


@torch.no_grad()
def sampled_from(vae, unet, said: Tensor, empty: Tensor, *, steps: int = 25, guidance: float = 4.0, seed: int = 0):
    """The same, of what the text encoder said of the prompts and of the empty one, (B, 77, D) each."""
    noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed + n)) for n in range(len(said))]
    x, context = torch.stack(noise).to(said.device), torch.cat([said, empty])
    plan = scheduler()
    plan.set_timesteps(steps)
    for t in plan.timesteps:
        with_prompt, without = unet(torch.cat([x, x]), t.to(said.device), context).sample.chunk(2)
        x = plan.step(without + guidance * (with_prompt - without), t, x).prev_sample
    return to_images(vae.decode(x / vae.config.scaling_factor).sample)


def noised(latents: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """x_t of (B, 4, h, w) latents, t (B,)."""
    a = alphas[t][:, None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise
