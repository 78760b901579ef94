"""Stage 1: the autoencoder, on scenes drawn anew for every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from personalize_core.mini import loop, places, world
from personalize_core.mini.names import SIZE
from personalize_core.mini.networks import Average, autoencoder, to_images, to_tensor


def scenes(rng: np.random.Generator, count: int, **odds: float) -> tuple[np.ndarray, np.ndarray, list[world.Scene]]:
    """Images (count, h, w, 3) and masks (count, h, w), uint8, and what they show."""
    drawn = [world.random_scene(rng, **odds) for _ in range(count)]
    images, masks = zip(*(world.draw(scene) for scene in drawn), strict=True)
    return np.stack(images), np.stack(masks), drawn


def cluttered(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks as of `scenes`, of two or three painted things anywhere, turned anyhow, of any size.

    An autoencoder that has only seen the world's scenes knows their sprites by heart and blurs designs that are new.
    """
    images, masks = [], []
    for _ in range(count):
        scene = world.random_scene(rng, plain=0, photo=1)
        image, mask = places.draw(scene.place, np.random.default_rng(scene.place_seed)), np.zeros((SIZE, SIZE))
        for _ in range(rng.integers(2, 4)):
            design = world.random_scene(rng, plain=0.1).design
            x, y = rng.uniform(0.15, 0.85, 2) * SIZE
            pose = world.Pose(rng.uniform(0.3, 0.9), x, y, rng.uniform(-180, 180), rng.random() < 0.5)
            image, alpha = world.placed(image, world.Thing(scene.category, design, pose))
            mask = np.maximum(mask, alpha)
        images.append((world.softened(image) * 255).round().astype(np.uint8))
        masks.append(((mask > 0.5) * 255).astype(np.uint8))
    return np.stack(images), np.stack(masks)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Per image, decibels, of uint8 images (B, h, w, 3)."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-6))


ANCHOR = 0.1  # weight of staying near the latents that the U-Net knows


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


class Autoencoder:
    name = "autoencoder"

    def __init__(self, seed: int = 0, batch: int = 16, lr: float = 2e-3, device: str = "cpu") -> None:
        self.seed, self.batch, self.device = seed, batch, device
        torch.manual_seed(seed)
        self.network = autoencoder().to(device)
        self.average = Average(self.network)
        self.modules = {"network": self.network, "average": self.average}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        images, masks, _ = scenes(rng, self.batch, plain=0.55, photo=0.85)
        x = to_tensor(images).to(self.device)
        weight = 1 + torch.from_numpy(masks).to(self.device)[:, None].float() / 255  # things count double
        posterior = self.network.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        drawn = self.network.decode(posterior.mean + posterior.std * noise).sample
        error = drawn - x
        loss = (weight * (2 * error**2 + 0.3 * error.abs())).mean()
        loss = loss + 0.3 * sum(F.l1_loss(a, b) for a, b in zip(edges(drawn), edges(x), strict=True))
        return loss + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel(), self.batch

    def after_step(self, number: int) -> None:
        self.average.update(self.network, number, longest=0.995)

    @torch.no_grad()
    def look(self, folder: Path, number: int) -> str:
        images, _, _ = scenes(np.random.default_rng(99), 64, plain=0.5)
        drawn = to_images(self.average.module(to_tensor(images).to(self.device)).sample)
        rows = [images[:16], drawn[:16], images[16:32], drawn[16:32]]
        grid = np.concatenate([np.concatenate(list(row), 1) for row in rows])
        Image.fromarray(grid).save(folder / f"look_{number:06d}.png")
        return f"{psnr(images, drawn).mean():.2f} dB on 64 fresh scenes"


@torch.no_grad()
def freeze(work: Path = loop.WORK) -> None:
    """Settle the latents: the averaged network, its four channels moved to mean 0 and deviation 1, in work/vae.

    The shift and scale go into the two 1x1 convolutions around the latents; what is drawn does not change.
    """
    vae = autoencoder()
    average = Average(vae)
    loop.load_modules(loop.last(work, "refined", "autoencoder"), {"average": average})
    vae = average.module
    rng = np.random.default_rng(3)
    means = torch.cat([vae.encode(to_tensor(scenes(rng, 50)[0])).latent_dist.mean for _ in range(20)])
    mean, deviation = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    first, last = vae.quant_conv, vae.post_quant_conv
    first.bias[:4] = (first.bias[:4] - mean) / deviation
    first.weight[:4] = first.weight[:4] / deviation[:, None, None, None]
    first.bias[4:] = first.bias[4:] - 2 * deviation.log()
    last.bias += (last.weight[:, :, 0, 0] * mean).sum(dim=1)
    last.weight *= deviation[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(work / "vae")
    print(f"latents had mean {mean.tolist()} and deviation {deviation.tolist()}; now 0 and 1")


class Refined(Autoencoder):
    """Stage 1b: the autoencoder that ships goes on, mostly on designs of two colours with a mark, half of it clutter.

    On the concepts it stood 3 dB below other scenes. An anchor holds the new latents near the old ones, so that the
    U-Net, which knows the old ones, need only be adapted.
    """

    name = "refined"

    def __init__(self, seed: int = 2, batch: int = 8, lr: float = 1e-3, device: str = "cpu") -> None:
        super().__init__(seed, batch, lr, device)
        self.network.load_state_dict(shipped().state_dict())
        self.average = Average(self.network)
        self.modules = {"network": self.network, "average": self.average}
        self.before = shipped().to(device)

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        images, masks, _ = scenes(rng, (self.batch + 1) // 2, plain=0.3, photo=0.9)
        busy, busy_masks = cluttered(rng, self.batch - len(images))
        images, masks = np.concatenate([images, busy]), np.concatenate([masks, busy_masks])
        x = to_tensor(images).to(self.device)
        weight = 1 + torch.from_numpy(masks).to(self.device)[:, None].float() / 255
        with torch.no_grad():
            old = self.before.encode(x).latent_dist.mean
        posterior = self.network.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        drawn = self.network.decode(posterior.mean + posterior.std * noise).sample
        error = drawn - x
        # Squares weigh more than in the first stage, whose loss was mostly edges by its end: decibels count squares.
        loss = (weight * (6 * error**2 + 0.3 * error.abs())).mean()
        loss = loss + 0.15 * sum(F.l1_loss(a, b) for a, b in zip(edges(drawn), edges(x), strict=True))
        loss = loss + ANCHOR * F.mse_loss(posterior.mean, old)
        return loss + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel(), self.batch


def shipped() -> AutoencoderKL:
    """The autoencoder under weights/, float32, never trained."""
    folder = Path(__file__).parent / "weights" / "base" / "vae"
    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return vae.requires_grad_(False).eval()  # type: ignore[return-value, union-attr]
