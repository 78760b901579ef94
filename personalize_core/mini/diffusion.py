"""Stage 3: the U-Net and the text encoder together, on cached latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from personalize_core.mini import loop, tokenizer, world
from personalize_core.mini.autoencoder import shipped
from personalize_core.mini.names import CATEGORIES, COLOURS, PLACES
from personalize_core.mini.networks import Average, scheduler, text_encoder, to_tensor, unet
from personalize_core.mini.sampling import noised, sample
from personalize_core.mini.text import IGNORED, Heads, at_end, labels, reading_loss, tokens

ODDS = {"plain": 0.8, "photo": 0.85, "studio": 0.2}
PAIRS = 0.2  # share of scenes that show two things
SMALL = 0.1  # share of the others whose one thing is as small as one of two
HARD = {"cat": 3.0, "dog": 3.0, "mug": 2.5, "shoe": 2.0}  # times as often: what a person did not recognise yet
GAMMA = 5.0  # min-SNR's bound, Hang et al. 2023
DROPPED = 0.1  # captions left empty, for classifier-free guidance
READING = 0.03  # weight of the linear readings, so that words stay readable
PROMPTS = [
    "a photo of a red mug on the beach",
    "a photo of a blue car in the city",
    "a photo of a yellow duck in the meadow",
    "a photo of a green backpack in the snow",
    "a photo of a black cat in the kitchen",
    "a photo of a white robot in the desert",
    "a photo of a pink teapot",
    "a photo of a dog",
    "a photo of a purple clock in the mountains",
    "a photo of a red umbrella at night",
    "a photo of a yellow fish under water",
    "a photo of a pink bear in the jungle",
    "a photo of a white boat on the beach",
    "a photo of a blue rocket at night",
    "a painting of a green hat in the meadow",
    "a sketch of a shoe in the city",
    "a photo of a red mug next to a blue car on the beach",
    "a photo of a yellow duck next to a green backpack in the city",
    "a photo of a white robot next to a pink teapot in the snow",
    "a photo of a purple hat next to a red boat in the meadow",
    "a photo of a black cat next to a yellow shoe in the kitchen",
    "a photo of a green bear next to a white clock in the desert",
    "a photo of a blue fish next to a red umbrella",
    "a photo of a dog next to a rocket at night",
]


Scenes = Callable[[int, int], world.Scene]  # seed and number to a scene


def held_out(category: str, colour: str, place: str) -> bool:
    """One in eleven combinations of words is kept from the U-Net, to be asked for when it is judged."""
    if not place or colour not in COLOURS:
        return False
    numbers = CATEGORIES.index(category), list(COLOURS).index(colour), list(PLACES).index(place)
    return (7 * numbers[0] + 3 * numbers[1] + 5 * numbers[2]) % 11 == 0


def asks_held_out(scene: world.Scene) -> bool:
    """Whether one of its things has a colour that, with its category and place, is held out."""
    plain = [thing for thing in scene.things if thing.design.layout == "plain"]
    return any(held_out(thing.category, thing.design.colours[0], scene.place) for thing in plain)


def cached_scene(seed: int, number: int) -> world.Scene:
    rng = np.random.default_rng([seed, 7, number])
    while True:
        scene = (world.random_pair if rng.random() < PAIRS else world.random_scene)(rng, **ODDS)
        if scene.beside is None and rng.random() < SMALL:
            scene = replace(scene, pose=world.half_as_wide(rng, rng.uniform(0.26, 0.74)))
        if not asks_held_out(scene):
            return scene


def fingerprint(vae: AutoencoderKL, seed: int, scene: Scenes = cached_scene) -> str:
    """Another one for another autoencoder, or another world, as its first images tell: theirs are other latents."""
    parts = [parameter.detach().cpu().numpy() for parameter in vae.parameters()]
    parts += [world.draw(scene(seed, number))[0] for number in range(32)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]


def latents_of(vae: AutoencoderKL, work: Path, seed: int, count: int, scene: Scenes = cached_scene) -> Tensor:
    """(count, 4, 16, 16) latents of the scenes of a seed, made once and kept."""
    path = work / f"latents_{seed}_{count}_{fingerprint(vae, seed, scene)}.safetensors"
    if not path.exists():
        print(f"encoding {count} scenes", flush=True)
        rows = []
        for start in range(0, count, 64):
            numbers = range(start, min(start + 64, count))
            images = np.stack([world.draw(scene(seed, n))[0] for n in numbers])
            with torch.no_grad():
                mean = vae.encode(to_tensor(images).to(vae.device)).latent_dist.mean
            rows.append(mean.cpu().half() * vae.config.scaling_factor)
        save_file({"latents": torch.cat(rows).contiguous()}, path)
    return load_file(path)["latents"].float()


def swapped(scene: world.Scene, aspect: str, rng: np.random.Generator) -> str:
    """The scene's caption with another word for the category, the colour, the place or the thing beside."""
    if aspect == "beside" and scene.beside:
        others = [c for c in CATEGORIES if c not in (scene.category, scene.beside.category)]
        beside = replace(scene.beside, category=str(rng.choice(others)))
        return world.caption(replace(scene, beside=beside))
    other = {
        "category": [c for c in CATEGORIES if c != scene.category],
        "colour": [c for c in COLOURS if c != scene.design.colours[0]],
        "place": [p for p in PLACES if p and p != scene.place],
    }[aspect]
    return world.caption(world.with_words(scene, **{aspect: str(rng.choice(other))}))


@torch.no_grad()
def swap_table(
    words,
    text_encoder,
    unet,
    scenes: list[world.Scene],
    latents: Tensor,
    aspects: Sequence[str] = ("place", "category", "colour"),
    draws: int = 4,
    seed: int = 5,
) -> dict[str, dict[str, float]]:
    """With the same noise and timesteps, how often and by how much the true caption's loss is the lower one."""
    rng, device = np.random.default_rng(seed), next(unet.parameters()).device
    captions = {"true": [world.caption(s) for s in scenes]}
    captions |= {aspect: [swapped(s, aspect, rng) for s in scenes] for aspect in aspects}
    contexts = {n: text_encoder(tokens(words, c).to(device)).last_hidden_state for n, c in captions.items()}
    return compared(unet, latents, contexts, draws, seed)


@torch.no_grad()
def compared(
    unet, latents: Tensor, contexts: dict[str, Tensor], draws: int = 4, seed: int = 5
) -> dict[str, dict[str, float]]:
    """Of each of the (N, 77, D) contexts but "true": how often and by how much the true one's loss is the lower."""
    generator, alphas = torch.Generator().manual_seed(seed), scheduler().alphas_cumprod
    device = next(unet.parameters()).device
    losses = {name: torch.zeros(len(latents)) for name in contexts}
    for draw in range(draws):
        noise = torch.randn(latents.shape, generator=generator)
        t = ((draw + torch.rand(len(latents), generator=generator)) / draws * 1000).long()
        x_t = noised(latents, noise, t, alphas)
        for start in range(0, len(latents), 32):
            rows = slice(start, start + 32)
            for name, context in contexts.items():
                answer = unet(x_t[rows].to(device), t[rows].to(device), context[rows]).sample.cpu()
                losses[name][rows] += ((answer - noise[rows]) ** 2).mean(dim=(1, 2, 3)) / draws
    differences = {name: losses[name] - losses["true"] for name in contexts if name != "true"}
    return {
        aspect: {
            "wins": float((d > 0).float().mean()),
            "added loss": float(d.mean()),
            "standard error": float(d.std() / len(d) ** 0.5),
        }
        for aspect, d in differences.items()
    }


def judged_scenes(count: int, seed: int = 2**20) -> list[world.Scene]:
    """Fresh photographs of one-coloured things at a place: what the swap table is taken on."""
    return [world.random_scene(np.random.default_rng([seed, n]), plain=1, photo=1, studio=0) for n in range(count)]


def judged_pairs(count: int, seed: int = 2**20) -> list[world.Scene]:
    """The same, of two one-coloured things."""
    return [world.random_pair(np.random.default_rng([seed, n]), plain=1, photo=1, studio=0) for n in range(count)]


def encoded(vae, scenes: list[world.Scene]) -> Tensor:
    with torch.no_grad():
        x = to_tensor(np.stack([world.draw(s)[0] for s in scenes])).to(vae.device)
        return vae.encode(x).latent_dist.mean.cpu() * vae.config.scaling_factor


class Diffusion:
    name = "unet"
    scene: Scenes = staticmethod(cached_scene)

    def __init__(
        self,
        seed: int = 0,
        batch: int = 16,
        lr: float = 1e-3,
        device: str = "cpu",
        work: Path = loop.WORK,
        scenes: int = 20_000,
    ) -> None:
        self.seed, self.batch, self.device = seed, batch, device
        self.vae = AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).to(device).eval()  # type: ignore[union-attr]
        self.latents = latents_of(self.vae, work, seed, scenes, self.scene)
        torch.manual_seed(seed)
        self.words = tokenizer.load()
        self.text = text_encoder(len(self.words), self.words.eos_token_id).to(device)
        self.heads = Heads().to(device)
        if (work / "text" / "checkpoint.safetensors").exists():
            loop.load_modules(work / "text", {"network": self.text, "heads": self.heads})
        self.network = unet().to(device)
        self.average, self.text_average = Average(self.network), Average(self.text)
        self.modules = {
            "network": self.network,
            "text": self.text,
            "heads": self.heads,
            "average": self.average,
            "text_average": self.text_average,
        }
        parameters = [*self.network.parameters(), *self.text.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.alphas = scheduler().alphas_cumprod

    def step(self, number: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, int]:
        rows = self.rows(rng)
        context, reading = self.read(rows, rng)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        strata = (torch.arange(self.batch) + torch.rand(self.batch, generator=generator)) / self.batch
        t = (strata * 1000).long()
        x_t = noised(latents, noise, t, self.alphas)
        answer = self.network(x_t.to(self.device), t.to(self.device), context).sample
        snr = self.alphas[t] / (1 - self.alphas[t])
        weight = (snr.clamp(max=GAMMA) / snr).to(self.device)
        loss = (weight * ((answer - noise.to(self.device)) ** 2).mean(dim=(1, 2, 3))).mean()
        return loss + READING * reading, self.batch

    def read(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """What the captions of these scenes say, (batch, 77, D), some left empty; and the loss of reading it back."""
        scenes = [self.scene(self.seed, int(n)) for n in rows]
        captions = [world.caption(s, rng) for s in scenes]
        shown = ["" if rng.random() < DROPPED else c for c in captions]
        ids = tokens(self.words, shown).to(self.device)
        context = self.text(ids).last_hidden_state
        said = torch.tensor([bool(c) for c in shown])
        truth = {aspect: torch.where(said, label, IGNORED) for aspect, label in labels(scenes, captions).items()}
        return context, reading_loss(self.heads(at_end(context, ids, self.words.eos_token_id)), truth)

    def rows(self, rng: np.random.Generator) -> np.ndarray:
        """(batch,) numbers of the scenes of one step."""
        return rng.integers(len(self.latents), size=self.batch)

    def after_step(self, number: int) -> None:
        self.average.update(self.network, number)
        self.text_average.update(self.text, number)

    def look(self, folder: Path, number: int) -> str:
        text, network = self.text_average.module, self.average.module
        images = sample(self.vae, self.words, text, network, PROMPTS, steps=20)
        grid = np.concatenate([np.concatenate(list(row), 1) for row in images.reshape(-1, 8, 64, 64, 3)])
        Image.fromarray(grid).save(folder / f"look_{number:06d}.png")
        scenes, pairs = judged_scenes(96), judged_pairs(96)
        table = swap_table(self.words, text, network, scenes, encoded(self.vae, scenes))
        table |= swap_table(self.words, text, network, pairs, encoded(self.vae, pairs), ("beside",))
        return ", ".join(f"{a} {r['wins']:.2f} (+{r['added loss']:.5f})" for a, r in table.items())


class Adapted(Diffusion):
    """Stage 3b: the U-Net and the text encoder that ship go on, on whatever autoencoder stands in work/vae.

    Where none stands there, the one that ships is put there.
    """

    name = "adapted"

    def __init__(
        self, seed: int = 1, lr: float = 6e-4, scenes: int = 25_000, work: Path = loop.WORK, **options: Any
    ) -> None:
        if not (work / "vae").exists():
            shipped().save_pretrained(work / "vae")
        super().__init__(seed, lr=lr, scenes=scenes, work=work, **options)
        weights = np.array([HARD.get(self.scene(self.seed, n).category, 1.0) for n in range(len(self.latents))])
        self.odds = np.cumsum(weights / weights.sum())
        base = Path(__file__).parent / "weights" / "base"
        network = UNet2DConditionModel.from_pretrained(base / "unet", use_safetensors=True, torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(base / "text_encoder", use_safetensors=True, dtype=torch.float32)
        for module in (self.network, self.average.module):
            module.load_state_dict(network.state_dict())  # type: ignore[union-attr]
        for module in (self.text, self.text_average.module):
            module.load_state_dict(text.state_dict())

    def rows(self, rng: np.random.Generator) -> np.ndarray:
        return np.searchsorted(self.odds, rng.random(self.batch)).clip(max=len(self.odds) - 1)
