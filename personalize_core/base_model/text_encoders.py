"""The text encoders of a base model: what they make of tokens, and the table of embeddings that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.prompt_variants import VariantReader, part_of
from personalize_core.base_model.text import Tokens


class Said(NamedTuple):
    """What the text encoders say of B prompts; of one prompt, without the first dimension."""

    hidden: Tensor  # (B, L, D): what the cross-attention layers read
    pooled: Tensor | None = None  # (B, P): what two encoders say of each whole text

    def rows(self) -> list[Said]:
        """Each prompt by itself."""
        return [Said(*row) for row in zip(*self._given(), strict=True)]

    @classmethod
    def of(cls, rows: Sequence[Said]) -> Said:
        """The opposite of `rows`."""
        return cls(*map(torch.stack, zip(*(row._given() for row in rows), strict=True)))

    def nothing(self) -> Said:
        """Zeros of the same shapes."""
        return Said(*map(torch.zeros_like, self._given()))

    def _given(self) -> list[Tensor]:
        return [part for part in self if part is not None]


class TextEncoders(nn.ModuleDict):
    """The text encoders by the names that diffusers' pipelines give them, as one.

    One encoder is read behind its final layer norm, as Stable Diffusion 1 and 2 do. Of two, as Stable Diffusion XL has
    them (Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", ICLR 2024,
    arXiv:2307.01952, sec. 2.1), the input of the last layer is read, side by side, and the second's projection of the
    text's end beside it.

    Args:
        encoders: name -> CLIP's text model; the second with its projection.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__(dict(encoders))

    @property
    def tables(self) -> list[nn.Embedding]:
        """The input embeddings of each encoder."""
        encoders: list[Any] = list(self.values())
        return [encoder.get_input_embeddings() for encoder in encoders]

    @property
    def widths(self) -> tuple[int, ...]:
        """How wide the input embeddings of each encoder are."""
        encoders: list[Any] = list(self.values())
        return tuple(encoder.config.hidden_size for encoder in encoders)

    @property
    def vocabulary(self) -> Tensor:
        """(V, D): the input embeddings of all entries of the vocabulary; of all encoders, side by side."""
        tables = [table.weight.detach() for table in self.tables]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=-1)

    def embeddings(self, ids: int | Sequence[int]) -> Tensor:
        """(D,), or (n, D): a copy of the input embeddings of some entries, likewise."""
        return torch.cat([table.weight.detach()[ids] for table in self.tables], dim=-1)

    def forward(self, tokens: Tokens, embedding: Tensor | None = None) -> Said:
        """What they say of the tokens.

        Args:
            embedding: (D,), or (B, 1, D) for each row its own, read in the placeholder's place; as wide as
                `vocabulary`.
        """
        with self.reading(tokens, embedding):
            if len(self) > 1:
                return self._of_both(tokens)
            (encoder,) = self.values()
            return Said(encoder(tokens.ids).last_hidden_state)

    def _of_both(self, tokens: Tokens) -> Said:
        first, second = self.values()
        before: list[Tensor] = []
        looks = [
            _last_layer(encoder).register_forward_pre_hook(lambda layer, args: before.append(args[0]))
            for encoder in (first, second)
        ]
        with hooked(*looks):
            first(tokens.ids)
            pooled = second(tokens.second_ids).text_embeds
        return Said(torch.cat(before, dim=-1), pooled)

    def variants(self, tokens: Tokens, rows: Tensor, positions: Tensor, first: int, embeddings: Tensor) -> Tensor:
        """(V, B, L, D): what the layers read of V variants of the tokens, but for the final layer norm of one encoder.

        Args:
            rows, positions, first, embeddings: see `VariantReader`; the embeddings as wide as `vocabulary`.
        """
        ids = [tokens.ids] if tokens.second_ids is None else [tokens.ids, tokens.second_ids]
        parts = zip(self.values(), ids, embeddings.split(self.widths, dim=-1), strict=True)
        read = [
            VariantReader(encoder, but_last=len(self) > 1)(own, rows, positions, first, embedding)
            for encoder, own, embedding in parts
        ]
        return read[0] if len(read) == 1 else torch.cat(read, dim=-1)

    def reading(self, tokens: Tokens, embedding: Tensor | None) -> AbstractContextManager[Any]:
        """Within it, the encoders read `embedding` wherever the placeholder stands."""
        stack = ExitStack()
        if embedding is not None:
            here = tokens.placeholder[..., None]  # (B, L, 1)
            for table, own in zip(self.tables, embedding.split(self.widths, dim=-1), strict=True):
                stack.enter_context(hooked(table.register_forward_hook(_putting(own, here))))
        return stack


def _last_layer(encoder: nn.Module) -> nn.Module:
    layers: Any = part_of(encoder, "layers")
    return layers[-1]


def _putting(embedding: Tensor, here: Tensor) -> Any:
    def put_in(module: nn.Module, args: tuple, looked_up: Tensor) -> Tensor:  # (B, L, D)
        return torch.where(here, embedding.to(looked_up), looked_up)

    return put_in
