"""The text encoders of a base model: what they make of tokens, and the table of embeddings that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.text import Tokens


class Said(NamedTuple):
    """What the text encoders say of B prompts; of one prompt, without the first dimension."""

    hidden: Tensor  # (B, L, D): what the cross-attention layers read

    def rows(self) -> list[Said]:
        """Each prompt by itself."""
        return [Said(*row) for row in zip(*self, strict=True)]

    @classmethod
    def of(cls, rows: Sequence[Said]) -> Said:
        """The opposite of `rows`."""
        return cls(*map(torch.stack, zip(*rows, strict=True)))


class TextEncoders(nn.ModuleDict):
    """The text encoders by the names that diffusers' pipelines give them, as one.

    Args:
        encoders: name -> CLIP's text model.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__(dict(encoders))

    @property
    def tables(self) -> list[nn.Module]:
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
        tables: list[Any] = [table.weight.detach() for table in self.tables]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=-1)

    def embeddings(self, ids: int | Sequence[int]) -> Tensor:
        """(D,), or (n, D): a copy of the input embeddings of some entries, likewise."""
        rows: list[Any] = [table.weight.detach()[ids] for table in self.tables]
        return torch.cat(rows, dim=-1)

    def forward(self, tokens: Tokens, embedding: Tensor | None = None) -> Said:
        """What they say of the tokens.

        Args:
            embedding: (D,), or (B, 1, D) for each row its own, read in the placeholder's place; as wide as
                `vocabulary`.
        """
        with self.reading(tokens, embedding):
            (encoder,) = self.values()
            return Said(encoder(tokens.ids).last_hidden_state)

    def reading(self, tokens: Tokens, embedding: Tensor | None) -> AbstractContextManager[Any]:
        """Within it, the encoders read `embedding` wherever the placeholder stands."""
        stack = ExitStack()
        if embedding is not None:
            here = tokens.placeholder[..., None]  # (B, L, 1)
            for table, own in zip(self.tables, embedding.split(self.widths, dim=-1), strict=True):
                stack.enter_context(hooked(table.register_forward_hook(_putting(own, here))))
        return stack


def _putting(embedding: Tensor, here: Tensor) -> Any:
    def put_in(module: nn.Module, args: tuple, looked_up: Tensor) -> Tensor:  # (B, L, D)
        return torch.where(here, embedding.to(looked_up), looked_up)

    return put_in
