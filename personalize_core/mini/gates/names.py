"""What the gates measure of names: composed ones, and ones that Textual Inversion fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from personalize_core.mini import name_reader, tokenizer, world
from personalize_core.mini.diffusion import encoded
from personalize_core.mini.named import Name, Speaker, judged_names, name_table, word_id
from personalize_core.mini.names import PHOTO_TEMPLATES, PLACES
from personalize_core.mini.networks import scheduler
from personalize_core.mini.sampling import noised, sampled_from
from personalize_core.mini.text import tokens

Figures = dict[str, float]
RENDERS = 4  # clean renders that a name is fitted to


def fitted(
    speaker: Speaker,
    unet: nn.Module,
    latents: Tensor,
    noun: str,
    *,
    steps: int,
    batch: int = 2,
    lr: float = 5e-3,
    first_timestep: int = 0,
    seed: int = 0,
) -> Tensor:
    """Textual Inversion: an embedding, (D,), fitted to latents (N, 4, 16, 16) of one thing, from its noun's."""
    generator, alphas = torch.Generator().manual_seed(seed), scheduler().alphas_cumprod
    table = speaker.text_encoder.get_input_embeddings().weight.detach()
    vector = table[word_id(speaker.words, noun)].clone().requires_grad_()
    optimizer = torch.optim.AdamW([vector], lr, weight_decay=0)
    for _ in range(steps):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        numbers = torch.randint(len(PHOTO_TEMPLATES), (batch,), generator=generator).tolist()
        captions = [PHOTO_TEMPLATES[n].format(tokenizer.RARE_TOKEN) for n in numbers]
        context = speaker.read(captions, vector.expand(batch, -1))
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(first_timestep, len(alphas), (batch,), generator=generator)
        loss = ((unet(noised(latents[rows], noise, t, alphas), t, context).sample - noise) ** 2).mean()
        (vector.grad,) = torch.autograd.grad(loss, [vector])
        optimizer.step()
    return vector.detach()


@torch.no_grad()
def images_of(
    vae, unet, speaker: Speaker, vectors: Tensor, places: list[str], *, guidance: float, seed: int = 0
) -> np.ndarray:
    """An image of each name, (N, D), at its place: (N, 64, 64, 3) uint8."""
    captions = [f"a photo of a {tokenizer.RARE_TOKEN} {PLACES[place]}".strip() for place in places]
    empty = speaker.text_encoder(tokens(speaker.words, [""])).last_hidden_state
    parts = []
    for start in range(0, len(captions), 20):
        said = speaker.read(captions[start : start + 20], vectors[start : start + 20])
        blank = empty.expand(len(said), -1, -1)
        parts.append(sampled_from(vae, unet, said, blank, guidance=guidance, seed=seed + start))
    return np.concatenate(parts)


def recognised(network: nn.Module, images: np.ndarray, scenes: list[world.Scene]) -> Figures:
    """The share of images in which the reader of names sees the right category, one of the two colours, and both."""
    read, truth = name_reader.verdicts(network, images), name_reader.truths(scenes)
    seen, right = (
        [{int(a), int(b)} for a, b in zip(found["first colour"], found["second colour"], strict=True)]
        for found in (read, truth)
    )
    hits = [len(a & b) for a, b in zip(seen, right, strict=True)]
    return {
        "category": float((read["category"] == truth["category"]).float().mean()),
        "one colour": float(np.mean([hit >= 1 for hit in hits])),
        "both colours": float(np.mean([hit == 2 for hit in hits])),
    }


def renders(scene: world.Scene, count: int) -> list[world.Scene]:
    """Photographs of the scene's thing on plain backdrops, in other poses."""
    rng = np.random.default_rng(scene.place_seed)
    return [
        replace(scene, place="", pose=world.random_pose(rng), place_seed=int(rng.integers(2**31))) for _ in range(count)
    ]


def composed_figures(
    model, speaker: Speaker, network: nn.Module, guidance: float, count: int
) -> tuple[Figures, np.ndarray]:
    """Of designs that training never saw, called by their whole names: what is sampled, and what a swap costs."""
    scenes = judged_names(count)
    with torch.no_grad():
        vectors = speaker.vectors([Name(scene) for scene in scenes])
    places = [scene.place for scene in scenes]
    images = images_of(model.vae, model.unet, speaker, vectors, places, guidance=guidance)
    figures = {f"composed: {what}": share for what, share in recognised(network, images, scenes).items()}
    for aspect, row in name_table(speaker, model.unet, scenes, encoded(model.vae, scenes)).items():
        figures |= {f"composed: {aspect} {figure}": value for figure, value in row.items()}
    own = np.stack([world.draw(scene)[0] for scene in scenes])
    figures |= {f"the reader's own {what} on renders": s for what, s in recognised(network, own, scenes).items()}
    return figures, images


def fitted_figures(
    model, speaker: Speaker, network: nn.Module, guidance: float, count: int, first_timestep: int, steps: int
) -> tuple[Figures, np.ndarray]:
    """The same of names that Textual Inversion fits to RENDERS renders of such a design, at four places each."""
    scenes = judged_names(count, seed=2**22)
    vectors = [
        fitted(
            speaker,
            model.unet,
            encoded(model.vae, renders(scene, RENDERS)),
            scene.category,
            steps=steps,
            first_timestep=first_timestep,
        )
        for scene in scenes
    ]
    everywhere = [replace(scene, place=place) for scene in scenes for place in ("", "beach", "snow", "city")]
    shown = torch.stack(vectors).repeat_interleave(4, dim=0)
    places = [scene.place for scene in everywhere]
    images = images_of(model.vae, model.unet, speaker, shown, places, guidance=guidance)
    return {f"fitted: {what}": share for what, share in recognised(network, images, everywhere).items()}, images
