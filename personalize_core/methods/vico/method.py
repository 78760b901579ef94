"""ViCo: a visual condition beside the text.

Hao et al., "ViCo: Plug-and-play Visual Condition for Personalized Text-to-image Generation", arXiv:2306.00971.
We follow the authors' code throughout. Summaries of the paper speak of an image encoder for the reference; there is
none, it goes through the U-Net itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Generator, Tensor, nn

from personalize_core.base_model.attention import AttentionMaps, Call
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.layers import transformer_of
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.errors import InputError
from personalize_core.methods.interface import Batch, Stage, Step
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.lag import localized, region
from personalize_core.methods.shared.layer_modules import LayerModules
from personalize_core.methods.shared.one_embedding import OneEmbedding
from personalize_core.methods.vico.recipe import Config

CANDIDATES = tuple(tenth / 10 for tenth in range(10))  # thresholds that Otsu's method tries


def transformers_with_images(transformers: Iterable[str]) -> tuple[str, ...]:
    """Every second transformer of the decoder, from its second on: four in Stable Diffusion 1 and 2, three in XL.

    Args:
        transformers: all of the U-Net by path, in the order they run.
    """
    return tuple(path for path in transformers if path.startswith("up_blocks."))[1::2]


class ViCo(OneEmbedding):
    """Four transformer blocks that attend to a reference concept image, and the placeholder's embedding.

    The clean latents of the reference, another concept image of the concept, go through the U-Net as rows behind the
    noisy ones, with the same timesteps and prompts; in sampling, where all share one reference, once for each prompt.
    Behind the text's own block in four transformers, a block of the method's lets the noisy rows attend to the
    reference rows, where those look at the placeholder.

    Of a reference, a Stable Diffusion XL's U-Net is told that it is a whole image, in training as in sampling.

    The blocks start at random, with nothing that closes them, so an untrained ViCo is not the base model. While it
    has seen no concept image its reference is all zeros.

    In sampling the reference is the mean of the concept image's posterior, prepared as in training. Deviates from the
    authors' code, which draws from the posterior once, and resizes with bilinear weights there.
    """

    Config = Config

    references: Tensor  # (concept images, 4, h, w)

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.embedding = ConceptEmbedding(class_embedding(base, concept.class_noun, config.class_token_rule))
        self.templates = read_list(TRAINING / f"{config.templates}.txt")
        # The last layer of each, behind whose block the image's own stands: of several, which is ours.
        chosen = transformers_with_images(base.transformers)
        self.layers = tuple(base.blocks_of([path])[-1].layer for path in chosen)
        layers = self.layers if config.image_attention else ()
        make = JOINING[config.joining]
        self.blocks = LayerModules({layer: make(base.blocks[layer].module) for layer in layers})
        self.register_buffer("references", torch.zeros(1, *base.latent_shape))
        self.register_load_state_dict_pre_hook(_make_room_for_references)
        self._sampled: Tensor | None = None  # (B, 4, h, w): the references of the batch in training

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    # Training

    def stages(self) -> list[Stage]:
        c = self.config
        groups: list[dict[str, Any]] = [{"params": [self.embedding.vector], "lr": c.embedding_lr}]
        if c.image_attention:
            groups.append({"params": list(self.blocks.parameters()), "lr": c.lr})
        return [Stage("blocks", c.steps, c.batch_size, groups, self._regularizer, max_gradient_norm=math.inf)]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        chosen = torch.randint(len(self.templates), (size,), generator=generator).tolist()
        rows = images.instance_rows(size, generator)
        self._sampled = images.another_of_each(rows, generator).latents
        self.references = torch.stack([views[0, 0] for views in images.concept]).to(self.references)
        return Batch.of(rows, [self.say(self.templates[index]) for index in chosen])

    def _regularizer(self, step: Step) -> dict[str, Tensor]:
        """Sum over the layers of mean((A_V / max A_V - A_E / max A_E)^2), with A_E held fixed.

        A_V, A_E: (B, h*w), where the reference looks at the placeholder, and at the end-of-text token.
        """
        if not self.config.regularizer:
            return {}
        distances = []
        for layer in map(of_reference, self.layers):
            with torch.no_grad():
                A_E = step.maps.on(layer, step.context.end)
            A_V = step.maps.on(layer, step.context.placeholder)
            distances.append((_by_maximum(A_V) - _by_maximum(A_E)).pow(2).mean())
        return {"regularizer": self.config.regularizer * step.share * torch.stack(distances).sum()}

    # Conditioning

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            if prompt.count(self.concept.placeholder) > 1:
                raise InputError(f"ViCo reads one placeholder in a prompt, but {prompt!r} has several; keep one")
        return super().condition(base, prompts)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        regularized = self.training and self.config.regularizer > 0
        if not self.config.image_attention and not regularized:
            return nullcontext()
        if not self.training and self.sampling.reference >= len(self.references):
            raise InputError(
                f"there is no concept image {self.sampling.reference} of {self.concept.name!r}; it was trained on "
                f"{len(self.references)}, counted from 0"
            )
        handles = list(self._doubling(base, regularized))
        for layer in self.layers if self.config.image_attention else ():
            text_block = base.blocks[layer].module
            handles.append(text_block.register_forward_hook(self._attending(layer), with_kwargs=True))
        return hooked(*handles)

    @torch.no_grad()
    def object_masks(self, base: BaseModel, prompt: str, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `interface.MasksReferences`. A mask depends on no noisy latents, only on the reference."""
        if not (self.config.image_attention and self.config.mask):
            return self.references, {}
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}

        def keep(layer: str) -> Callable:
            return lambda block, args, given: found[layer].append(given["encoder_attention_mask"][0, 0])

        before, steps = self.sampling, torch.tensor([t], device=base.device)
        hooks = [block.register_forward_pre_hook(keep(path), with_kwargs=True) for path, block in self.blocks.by_path()]
        try:
            with hooked(*hooks), self.attach(base):
                for number, reference in enumerate(self.references):
                    self.sampling = dataclasses.replace(before, reference=number)
                    base.denoise(reference[None], steps, self.condition(base, [prompt])(steps))
        finally:
            self.sampling = before
        return self.references, {layer: torch.stack(masks) for layer, masks in found.items()}

    def _doubling(self, base: BaseModel, regularized: bool) -> tuple:
        """Hooks that add the reference rows to the U-Net's input, and drop them from its output.

        The call that goes through the U-Net is altered for good, not only while it runs: gradient checkpointing runs
        parts of it again, in backward. The maps that the caller asked for are of the caller's rows.
        """
        asked_for: list[AttentionMaps] = []

        def add(unet: nn.Module, args: tuple[Tensor, Tensor, Tensor], kwargs: dict[str, Any]) -> tuple:
            x_t, t, hidden = args
            call = _call_among(kwargs.values())
            asked_for.append(call.maps)
            call.maps = AttentionMaps(call.maps.latest_only)
            call.context = call.context.and_again()
            behind = len(call.context) - len(x_t)
            if call.context.sizes is not None:
                own = torch.cat([call.context.sizes[: len(x_t)], base.whole_images(behind)])
                call.context = dataclasses.replace(call.context, sizes=own)
            call.t = torch.cat([call.t, call.t[:behind]])
            references = self._references_for(behind, call.rows).to(x_t)
            self._check_size(references, x_t, base.vae_scale)
            kwargs |= base.beside_text(call.context)
            return (torch.cat([x_t, references]), call.t, call.context.hidden), kwargs

        def drop(unet: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            call, maps = _call_among(kwargs.values()), asked_for.pop()
            rows, _ = _noisy_and_behind(call.context)
            maps.include(call.maps, slice(rows))
            if regularized:
                maps.include(call.maps, slice(rows, None), {layer: of_reference(layer) for layer in self.layers})
            output.sample = output.sample[:rows]
            return output

        return (
            base.unet.register_forward_pre_hook(add, with_kwargs=True),
            base.unet.register_forward_hook(drop, with_kwargs=True),
        )

    def _references_for(self, rows: int, of_batch: slice | None) -> Tensor:
        """(rows, 4, h, w), clean; in training those of these rows of the batch."""
        if not self.training:
            return self.references[self.sampling.reference].expand(rows, -1, -1, -1)
        sampled = None if self._sampled is None else self._sampled[of_batch or slice(None)]
        if sampled is None or len(sampled) != rows:
            raise RuntimeError(f"ViCo trains on pairs: `batch` has to draw references for these {rows} rows first")
        return sampled

    def _check_size(self, references: Tensor, x_t: Tensor, vae_scale: int) -> None:
        """Both go through the U-Net as one batch; an artifact has its references at the size it was trained at."""
        if references.shape[-2:] != x_t.shape[-2:]:
            trained, wanted = references.shape[-1] * vae_scale, x_t.shape[-1] * vae_scale
            raise InputError(
                f"{self.concept.name!r} was trained by ViCo at {trained} pixels, as which it keeps its references, and "
                f"images of {wanted} were asked for; train it again, or set image_size back"
            )

    def _attending(self, layer: str) -> Callable:
        block = self.blocks.of(layer)

        def attend(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            call = _call_among((*args, *kwargs.values()))
            rows, behind = _noisy_and_behind(call.context)
            x, r = output[:rows], output[rows:]
            attended = block(x, encoder_hidden_states=output[behind], encoder_attention_mask=self._mask(call, layer))
            if not self.training and self.sampling.lag:
                inside = region(call, transformer_of(layer), self.place, self.sampling.lag_unconditional)
                attended = localized(inside[: len(x)], x, attended)
            return torch.cat([attended.to(r.dtype), r])

        return attend

    @torch.no_grad()
    def _mask(self, call: Call, layer: str) -> Tensor | None:
        """(B, 1, h*w) bool: where in the reference the concept is, by this call's maps."""
        if not self.config.mask:
            return None
        rows, behind = _noisy_and_behind(call.context)
        maps = AttentionMaps()
        maps.include(call.maps, behind, {layer: layer})
        partner = call.context.partner[:rows]
        own = otsu(maps.on(layer, looked_at(call.context)[:rows]))
        return (own[partner] if self.sampling.uncond_mask == "from_cond" else own)[:, None]


def image_block(text_block: BasicTransformerBlock) -> BasicTransformerBlock:
    """A new transformer block like the text's, but with keys and values from features as wide as its own."""
    heads = text_block.attn2.heads  # type: ignore[union-attr]
    return BasicTransformerBlock(text_block.dim, heads, text_block.dim // heads, cross_attention_dim=text_block.dim)


class AtTheSamePlace(nn.Module):
    """x + W (r where the mask is), or x + W (x, r where it is): in the place of an image block's attention.

    What the reference shows in one place then acts in the same place of the image, and nowhere else. Ours, as is the
    sum with x.

    Args:
        width: C, of the features.
        beside: x goes into the linear layer too.
    """

    def __init__(self, width: int, beside: bool) -> None:
        super().__init__()
        self.beside = beside
        self.projection = nn.Linear(2 * width if beside else width, width)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None) -> Tensor:
        """x, encoder_hidden_states (r): (B, h*w, C); encoder_attention_mask: (B, 1, h*w) bool. As an image block."""
        r = encoder_hidden_states
        if encoder_attention_mask is not None:
            r = r * encoder_attention_mask.mT
        return x + self.projection(torch.cat([x, r], dim=-1) if self.beside else r)


JOINING: dict[str, Callable[[BasicTransformerBlock], nn.Module]] = {
    "attention": image_block,
    "concatenation": lambda text_block: AtTheSamePlace(text_block.dim, beside=True),
    "addition": lambda text_block: AtTheSamePlace(text_block.dim, beside=False),
}


def looked_at(context: TextContext) -> Tensor:
    """(B, L) bool: in each row the placeholder, or else the end-of-text token.

    A row of guidance's prompt-free half takes its partner's position, whatever stands there.
    """
    named = context.placeholder.any(dim=1, keepdim=True)
    return torch.where(named, context.placeholder, context.end)[context.partner]


def otsu(attention: Tensor) -> Tensor:
    """(B, N) to bool, at the threshold of each row that best separates two classes (Otsu 1979), out of ten.

    Scaled to [0, 1] by the row's extremes, a row is parted into those below the threshold and the others; the best
    parting has the largest w0 w1 (mu0 - mu1)^2, the smallest threshold among equals. A constant row is all True.
    """
    lowest, highest = attention.amin(dim=-1, keepdim=True), attention.amax(dim=-1, keepdim=True)
    a = (attention - lowest) / (highest - lowest).where(highest > lowest, 1)
    thresholds = torch.tensor(CANDIDATES, device=a.device, dtype=a.dtype)
    above = a[:, None] >= thresholds[:, None]  # (B, 10, N)
    w1 = above.to(a.dtype).mean(dim=-1)
    w0 = 1 - w1
    sum1 = (a[:, None] * above).mean(dim=-1)  # w1 mu1
    sum0 = a.mean(dim=-1, keepdim=True) - sum1
    parted = (w0 > 0) & (w1 > 0)
    between = w0 * w1 * (sum0 / w0.where(parted, 1) - sum1 / w1.where(parted, 1)).square() * parted
    best = between.argmax(dim=-1, keepdim=True)
    return above.gather(1, best[..., None].expand(-1, -1, a.shape[-1]))[:, 0]


def of_reference(layer: str) -> str:
    """The name under which a step's maps hold those of the reference rows."""
    return f"{layer} of the reference"


def _noisy_and_behind(context: TextContext) -> tuple[int, slice | Tensor]:
    """How many rows of `TextContext.and_again` are noisy, and where the reference row of each is."""
    if context.distinct is None:
        return len(context) // 2, slice(len(context) // 2, None)
    _, places = context.distinct
    return len(places), len(places) + places


def _by_maximum(attention: Tensor) -> Tensor:
    return attention / attention.amax(dim=-1, keepdim=True)


def _call_among(arguments: Any) -> Call:
    """The call that diffusers hands on, by position or by name."""
    return next(given["call"] for given in arguments if isinstance(given, dict) and "call" in given)


def _make_room_for_references(method: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before loading: there are as many as there were concept images, which is not known before."""
    saved = state.get(f"{prefix}references")
    if saved is not None:
        method.references = torch.empty_like(saved, device=method.references.device)
