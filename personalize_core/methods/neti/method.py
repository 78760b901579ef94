"""NeTI: a neural space-time representation of a concept.

Alaluf et al., "A Neural Space-Time Representation for Text-to-Image Personalization", SIGGRAPH Asia 2023,
arXiv:2305.15391. We follow the authors' code (NeuralTextualInversion/NeTI); where it decides something that the
paper's description leaves open, that is said below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning, TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.errors import InputError
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.neti.recipe import Config
from personalize_core.methods.shared.concept_embedding import class_embedding
from personalize_core.methods.shared.training_batches import from_templates

FREQUENCIES = 1024  # random Fourier features of (t, l)
HIDDEN = 128  # units that nested dropout orders
BYPASS = 0.2  # length of the bypass, as a share of the hidden state's


class FourierFeatures(nn.Module):
    """f(t, l) = [sin W x; cos W x] / its norm, with x = (t, l) and a fixed random W.

    W is a buffer: the code loses it from its state dict and saves it apart.
    """

    W: Tensor
    width = 2 * FREQUENCIES

    def __init__(self, sigma_t: float, sigma_l: float) -> None:
        super().__init__()
        self.register_buffer("W", torch.randn(FREQUENCIES, 2) * torch.tensor([sigma_t, sigma_l]))

    def forward(self, t: Tensor, layer: Tensor) -> Tensor:
        """t: (...), 0 to 999. layer: (...), from 0. -> (..., 2048), of norm 1."""
        angles = torch.stack([t, layer], dim=-1).to(self.W) @ self.W.T
        return F.normalize(torch.cat([angles.sin(), angles.cos()], dim=-1), dim=-1)


class Scaled(nn.Module):
    """The code's alternative to Fourier features: t and l, each from -1 to 1."""

    width = 2

    def __init__(self, timesteps: int, layers: int) -> None:
        super().__init__()
        self.timesteps, self.layers = timesteps, layers

    def forward(self, t: Tensor, layer: Tensor) -> Tensor:
        """t: (...), 0 to 999. layer: (...), from 0. -> (..., 2)."""
        return torch.stack([2 * t / (self.timesteps - 1) - 1, 2 * layer / (self.layers - 1) - 1], dim=-1)


class Mapper(nn.Module):
    """M(t, l): the concept's input embedding at a timestep and a cross-attention layer, and its bypass.

    For two text encoders it makes a pair of each, as heads of one network.

    Args:
        config: which parts it has.
        widths: D of each text encoder.
        timesteps: how many the base model was trained with.
        norm: () of the class noun's embedding; of two text encoders (2,), of both of the pair.
        layers: how many cross-attention layers it tells apart.
    """

    norm: Tensor

    def __init__(self, config: Config, widths: Sequence[int], timesteps: int, norm: Tensor, layers: int) -> None:
        super().__init__()
        self.config, self.layers, self.widths = config, layers, tuple(widths)
        self.register_buffer("norm", norm.detach().clone().float())
        if config.positional_encoding:
            self.encode = FourierFeatures(config.sigma_t, config.sigma_l)
            self.anchors = nn.Linear(self.encode.width, config.time_anchors * layers)
            times = torch.arange(config.time_anchors) * (timesteps // config.time_anchors)
            with torch.no_grad():  # one unit starts as the features of each anchor, layer after layer at each time
                self.anchors.weight.copy_(self._at_every_layer(times).transpose(0, 1).flatten(0, 1))
            features = self.anchors.out_features
        else:
            self.encode, self.anchors = Scaled(timesteps, layers), nn.Identity()
            features = self.encode.width
        self.hidden = nn.Sequential(
            *(nn.Linear(features, HIDDEN), nn.LayerNorm(HIDDEN), nn.LeakyReLU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.LeakyReLU()),
        )
        self.output = nn.Linear(HIDDEN, (1 + config.bypass) * sum(widths))

    def _at_every_layer(self, t: Tensor) -> Tensor:
        """t: (B,). -> what is known of a timestep and a layer, (layers, B, 2048 or 2)."""
        layers = torch.arange(self.layers, device=t.device)[:, None].expand(-1, len(t))
        return self.encode(t.expand_as(layers), layers)

    def forward(self, t: Tensor, truncation: int | None = None) -> tuple[Tensor, Tensor | None]:
        """t: (B,). -> for every layer the embedding (layers, B, D), and the bypass (layers, B, D) if it has one.

        Units of the hidden layer from `truncation` on are silenced, but not in training.
        """
        hidden = self.hidden(self.anchors(self._at_every_layer(t)))
        if self.training:
            hidden = hidden * self._nested_dropout(len(t)).to(hidden.device)
        elif truncation is not None:
            hidden = hidden * (torch.arange(HIDDEN, device=hidden.device) < truncation)
        said = self.output(hidden)
        outputs = said.chunk(2, dim=-1) if self.config.bypass else (said,)
        by_encoder = zip(*(output.split(self.widths, dim=-1) for output in outputs), strict=True)
        rescaled = [self._rescaled(own, norm) for own, norm in zip(by_encoder, self.norm.flatten(), strict=True)]
        embedding, *bypass = (torch.cat(parts, dim=-1) for parts in zip(*rescaled, strict=True))
        return embedding, bypass[0] if bypass else None

    def _rescaled(self, said: tuple[Tensor, ...], norm: Tensor) -> tuple[Tensor, ...]:
        """What it says to one text encoder: the embedding, (layers, B, D), and the bypass if it has one."""
        match self.config.rescale:
            case "joint":
                return (norm * F.normalize(torch.cat(said, dim=-1), dim=-1)).chunk(len(said), dim=-1)
            case "per_half":
                return tuple(norm * F.normalize(each, dim=-1) for each in said)
        return said

    def _nested_dropout(self, rows: int) -> Tensor:
        """(layers, rows, 128) bool: in a layer's rows, if they are chosen, units from a random one on fall out.

        The code draws once per call, which is one layer with a batch of `dropout_rows` rows, whether it drops at all,
        and then for each row where the cut lies, from 0 to 127. From torch's global stream, as all dropout is, and on
        the CPU, so that no device changes it.
        """
        calls = -(-rows // self.config.dropout_rows)
        drops = torch.rand(self.layers, calls) < self.config.nested_dropout
        drops = drops.repeat_interleave(self.config.dropout_rows, dim=1)[:, :rows]
        cut = torch.where(drops, torch.randint(HIDDEN, (self.layers, rows)), HIDDEN)
        return torch.arange(HIDDEN) < cut[..., None]


class NeTI(Method):
    """A small network in the placeholder's place: another word for every timestep and cross-attention layer."""

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        noun = class_embedding(base, concept.class_noun, config.class_token_rule)
        norms = [part.norm() for part in noun.split(base.text_encoders.widths)]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms)
        timesteps: int = base.scheduler.config.num_train_timesteps
        self.mapper = Mapper(config, base.text_encoders.widths, timesteps, norm, len(base.transformers))
        self.templates = read_list(TRAINING / f"{config.templates}.txt")

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        groups = [{"params": list(self.mapper.parameters()), "lr": c.lr}]
        unclipped = math.inf  # as the code leaves them
        return [
            Stage("mapper", c.steps, c.batch_size, groups, max_gradient_norm=unclipped, min_timestep=c.min_timestep)
        ]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        return from_templates(self, self.templates, images, size, generator)

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        """Raises InputError if a prompt mentions the concept more than once; the code finds only one place."""
        plain = base.encode(prompts, self.concept)
        for prompt, mentions in zip(prompts, plain.placeholder.sum(dim=1).tolist(), strict=True):
            if mentions > 1:
                raise InputError(
                    f"NeTI reads one {self.concept.placeholder!r} per prompt, and this has {mentions}: {prompt!r}"
                )
        if not any(self.concept.placeholder in prompt for prompt in prompts):
            return lambda t: plain
        return lambda t: self._at(t, base, prompts, plain)

    def _at(self, t: Tensor, base: BaseModel, prompts: Sequence[str], plain: TextContext) -> TextContext:
        """What every layer reads at timesteps t (B,), all in one pass of the text encoder, layer after layer."""
        embedding, bypass = self.mapper(t, self.sampling.truncation)
        if len(base.text_encoders) > 1:  # a U-Net that is told of the whole text is told of one, which is ours
            plain = base.encode(prompts, self.concept, embedding.mean(dim=0)[:, None])
        read = base.prompt_reader.encode_variants(prompts, self.concept, embedding)
        keys = values = base.prompt_reader.final_norm(read.hidden)
        if bypass is not None:
            layers = torch.arange(len(keys), device=keys.device)[:, None]
            here = (layers, read.rows, read.positions)
            before = read.hidden[here].split(self.mapper.widths, dim=-1)
            by_encoder = zip(before, bypass[:, read.rows].split(self.mapper.widths, dim=-1), strict=True)
            passed = torch.cat([with_bypass(*own) for own in by_encoder], dim=-1)
            values = keys.index_put(here, base.prompt_reader.final_norm(passed))
        return dataclasses.replace(plain, layers=(keys, values), of_layer=base.transformer_of_layer)


def with_bypass(before: Tensor, bypass: Tensor) -> Tensor:
    """h' = h + 0.2 |h| b / |b|, for the placeholder.

    Args:
        before: h, (..., D), the text encoder's last hidden state before its final layer norm.
        bypass: b, (..., D).
    """
    return before + BYPASS * F.normalize(bypass, dim=-1) * before.norm(dim=-1, keepdim=True)
