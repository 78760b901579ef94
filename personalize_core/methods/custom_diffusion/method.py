"""Custom Diffusion.

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023, arXiv:2212.04488. The augmentation,
its mask and the stop at the start token are in the authors' code (adobe-research/custom-diffusion), which we follow;
where diffusers' port of it differs, that is said below. One concept: joint training and merging are not built.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents, Zoom, zooms
from personalize_core.errors import InputError
from personalize_core.methods.custom_diffusion.recipe import Config
from personalize_core.methods.interface import Batch, Stage, equal_shares
from personalize_core.methods.shared.attention_processors import read_processors, save_processors
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.interchange import elsewhere, fill, read_embedding, save_embedding
from personalize_core.methods.shared.lag import attached
from personalize_core.methods.shared.one_embedding import OneEmbedding
from personalize_core.methods.shared.tuned_weights import TunedWeights

TEMPLATE = "photo of a {}"
SAYS = {
    "plain": ("",),
    "far": ("a far away ", "very small "),
    "near": ("zoomed in ", "close up "),
}  # before the template
RARE = "ktn"  # the entry of the vocabulary that the first concept starts from, in both codes


class CustomDiffusion(OneEmbedding):
    """Keys and values of every cross-attention layer, and the embedding of one new word."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(initial_embedding(base, config.initial_word))
        trained = ("to_k.", "to_v.") if config.trained == "kv" else ("",)
        self.weights = TunedWeights(
            base.unet,
            [
                f"{path}.{name}"
                for path, layer in cross_attention(base).items()
                for name, _ in layer.named_parameters()
                if name.startswith(trained)
            ],
            base.unrounded,
        )
        self.zooms = zooms(base.image_size)
        self.image_size = base.image_size

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("weights", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        """The concept's rows, each with the words and the mask of its zoom, then as many class images."""
        rows, c = images.instance_rows(size, generator), self.config
        shown = [self.zooms[view] if c.zoom else self.zooms[0] for view in rows.views]  # the first is plain
        prompts = [self._words(zoom, generator) + self.say(TEMPLATE) for zoom in shown]
        masks = torch.stack([loss_mask(zoom, self.image_size, *rows.latents.shape[2:]) for zoom in shown])
        # sum(mask * error) / (4 sum(mask)) of each row, as a weight on its mean
        weight = equal_shares(size, c.instance_scale) * masks / masks.mean(dim=(1, 2, 3), keepdim=True)
        batch = Batch(rows.latents, prompts, weight, rows.sizes)
        if c.regularization == "none":
            return batch
        prior = images.prior_rows(size, generator)
        captions = [self._caption(images, image) for image in prior.images]
        weight = equal_shares(size, c.prior_weight).expand(-1, *masks.shape[1:])
        return batch.followed_by(Batch(prior.latents, captions, weight, prior.sizes))

    def _words(self, zoom: Zoom, generator: Generator) -> str:
        choices = SAYS[zoom.kind]
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def _caption(self, images: ConceptLatents, image: int) -> str:
        """Of a class image: its own, or what the authors' code says of generated ones (diffusers': the noun alone)."""
        own = images.captions[image] if images.captions else ""
        return own or TEMPLATE.replace("{}", self.concept.class_noun)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        weights = self._weights(base)
        return attached(base, self, lambda transformer: self._inside(base, transformer, weights))

    @contextmanager
    def _inside(self, base: BaseModel, transformer: str, weights: TunedWeights) -> Iterator[None]:
        handles = []
        if self.config.detach_start and self.training:
            for layer in cross_attention(base, [transformer]).values():
                handles += [p.register_forward_hook(self._detach_start) for p in (layer.to_k, layer.to_v)]
        with weights.placed_in(base.unet, f"{transformer}."), hooked(*handles):
            yield

    def _detach_start(self, module: nn.Module, args: tuple[Tensor], projected: Tensor) -> None:
        """projected: (B, L, C) keys or values. The start token is the same in every prompt, and should not teach."""
        if projected.requires_grad:
            projected.register_hook(_without_start)

    def _weights(self, base: BaseModel) -> TunedWeights:
        """What was learned; compressed, if sampling asks for it."""
        if self.training or self.sampling.keep == 1:
            return self.weights
        compressed, originals = copy.deepcopy(self.weights), dict(base.unet.named_parameters())
        for name, weight in compressed.requires_grad_(False).items():
            if name.endswith(("to_k.weight", "to_v.weight")):
                original = base.unrounded.get(name, originals[name]).to(weight)
                weight.copy_(original + leading(weight - original, self.sampling.keep))
        return compressed

    def export(self, base: BaseModel, folder: Path) -> str:
        how = save_processors(self._weights(base).items(), base, folder)
        word = save_embedding(self.embedding.vector, base, self.concept, folder)
        return f"{how}; {word}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> CustomDiffusion:
        """A folder with the attention processors' weights, and an embedding's file."""
        tensors = read_processors(path)
        whole = any(".to_q." in name for name in tensors)
        method = cls(dataclasses.replace(config, trained="attn2" if whole else "kv"), base, concept)
        fill(method.weights.items(), tensors, path)
        fill([("vector", method.embedding.vector)], {"vector": read_embedding(path, base.text_encoders.widths)}, path)
        return method


def cross_attention(base: BaseModel, transformers: Iterable[str] | None = None) -> dict[str, Any]:
    """Path in the U-Net -> cross-attention layer (diffusers' Attention), in some transformers or all."""
    return {f"{block.path}.attn2": block.module.attn2 for block in base.blocks_of(transformers)}


def initial_embedding(base: BaseModel, wanted: str | None) -> Tensor:
    """(D,): what the concept's embedding starts from.

    Diffusers' script looks its initial token up in the vocabulary, so "ktn" is the entry without the end-of-word mark,
    row 42170 of CLIP's. As a word it would be two tokens.

    Raises:
        InputError: what is wanted is neither one token nor an entry.
    """
    if wanted is None:
        entry = base.entry_embedding(RARE)
        return base.rare_embedding() if entry is None else entry
    tokens = len(base.tokenizer.class_noun_ids(wanted))
    if tokens == 1:
        return base.word_embedding(wanted)
    entry = base.entry_embedding(wanted)
    if entry is None:
        raise InputError(
            f"initial_word = {wanted!r} is {tokens} tokens for this base model, and no entry of its vocabulary; choose "
            "a word that is one token"
        )
    return entry


def loss_mask(zoom: Zoom, size: int, height: int, width: int) -> Tensor:
    """(1, height, width): the latent pixels that count in the loss of a (size, size) image.

    All of them, but for a concept image on a grey canvas: there those inside it, less one on each side, whose latents
    see the canvas too.
    """
    if zoom.kind != "far":
        return torch.ones(1, height, width)
    mask = torch.zeros(1, height, width)
    (top, bottom), (left, right) = (
        (start * cells // size + 1, (start + zoom.side) * cells // size - 1)
        for start, cells in ((zoom.top, height), (zoom.left, width))
    )
    if top >= bottom or left >= right:
        raise ValueError(
            f"a concept image of {zoom.side} pixels leaves nothing of {height} x {width} latents to learn from"
        )
    mask[:, top:bottom, left:right] = 1
    return mask


def _without_start(gradient: Tensor) -> Tensor:
    """(B, L, C), with 0 for the first token."""
    kept = gradient.clone()
    kept[:, 0] = 0
    return kept


def leading(change: Tensor, share: float) -> Tensor:
    """The part of a matrix that its leading singular values make, as many as stay within `share` of their sum."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    kept = s.cpu().cumsum(dim=0).to(s) <= share * s.sum()  # a GPU has no deterministic kernel for it
    return u @ (s * kept)[:, None].mul(v)
