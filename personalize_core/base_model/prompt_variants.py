"""The same prompts read with many embeddings in the placeholder's place, without computing twice what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK = 1.702  # quick GELU is x sigmoid(QUICK x)

Projected = tuple[Tensor, ...]
"""Queries, keys and values of a layer's self-attention, (N, tokens, D) each."""


@dataclass(frozen=True)
class PromptVariants:
    """V variants of B prompts."""

    hidden: Tensor  # (V, B, L, D), before `PromptReader.final_norm`
    rows: Tensor  # (K,): in which prompts placeholders stand
    positions: Tensor  # (K,): at which positions there


class VariantReader:
    """CLIP's text encoder for V variants of B prompts: as a loop over the variants, up to rounding.

    The encoder is causal, so tokens before the first placeholder are the same in all variants, and are read once for
    each prompt. In the first layer that is true of all projections but the placeholders' own. No gradient is computed
    through any of them.

    Args:
        text_encoder: CLIP's, frozen.
        but_last: leave the last layer out.
    """

    def __init__(self, text_encoder: nn.Module, but_last: bool = False) -> None:
        layers: Any = part_of(text_encoder, "layers")
        self._layers: Any = layers[:-1] if but_last else layers
        self._words: Any = text_encoder.get_input_embeddings()  # type: ignore[operator]
        self._positions: Any = part_of(text_encoder, "position_embedding")

    def __call__(self, ids: Tensor, rows: Tensor, positions: Tensor, first: int, embeddings: Tensor) -> Tensor:
        """The hidden states behind the last layer that is read, (V, B, L, D).

        Args:
            ids: (B, L).
            rows: (K,), see PromptVariants.
            positions: (K,), likewise.
            first: the lowest of them.
            embeddings: (V, K, D), what each variant reads in their places.
        """
        variants, (prompts, length) = len(embeddings), ids.shape
        with torch.no_grad():
            same = self._words(ids) + self._positions.weight[:length]  # (B, L, D), wrong where a placeholder stands
            shared = [_projected(self._layers[0], same)]
            before = _after_layer(self._layers[0], same[:, :first], tuple(p[:, :first] for p in shared[0]))
            for layer in self._layers[1:]:
                shared.append(_projected(layer, before))
                before = _after_layer(layer, before, shared[-1])
        own = embeddings + self._positions(positions)  # (V, K, D)

        def with_own(theirs: Tensor, ours: Tensor) -> Tensor:
            """(B, tokens, D) of all variants and (V, K, D) -> (V * B, tokens, D)."""
            everywhere = (torch.arange(variants, device=ids.device)[:, None], rows, positions)
            return theirs.expand(variants, -1, -1, -1).index_put(everywhere, ours).flatten(0, 1)

        hidden = with_own(same, own)[:, first:]
        projected = tuple(map(with_own, shared[0], _projected(self._layers[0], own)))
        hidden = _after_layer(self._layers[0], hidden, projected)
        for layer, of_before in zip(self._layers[1:], shared[1:], strict=True):
            both = zip(of_before, _projected(layer, hidden), strict=True)
            hidden = _after_layer(layer, hidden, tuple(torch.cat([p.repeat(variants, 1, 1), q], 1) for p, q in both))
        return torch.cat([before.expand(variants, -1, -1, -1), hidden.unflatten(0, (variants, prompts))], dim=2)


def part_of(text_encoder: nn.Module, name: str) -> nn.Module:
    """A part by the end of its path, because releases of transformers keep the parts in different places."""
    return next(module for path, module in text_encoder.named_modules() if path.rpartition(".")[2] == name)


def _projected(layer: Any, hidden: Tensor) -> Projected:
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)


def _after_layer(layer: Any, hidden: Tensor, projected: Projected) -> Tensor:
    """What a layer makes of the last tokens, (N, tokens, D), with the projections of these and of all before them."""
    attention, ours = layer.self_attn, slice(projected[0].shape[1] - hidden.shape[1], None)
    query, key, value = (p.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projected)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (N, heads, tokens, d)
    attended = attended.transpose(1, 2)[:, ours].flatten(2).contiguous()  # else a product for every row of the batch
    return _after_mlp(layer, hidden + attention.out_proj(attended))


def _after_mlp(layer: Any, hidden: Tensor) -> Tensor:
    """With quick GELU as silu(QUICK x) / QUICK, which keeps and moves half of the memory of x sigmoid(QUICK x)."""
    norm, mlp = layer.layer_norm2, layer.mlp
    if mlp.config.hidden_act != "quick_gelu":
        return hidden + mlp(norm(hidden))
    scaled = F.layer_norm(hidden, norm.normalized_shape, QUICK * norm.weight, QUICK * norm.bias, norm.eps)
    inside = F.silu(F.linear(scaled, mlp.fc1.weight, QUICK * mlp.fc1.bias))
    return torch.add(hidden, F.linear(inside, mlp.fc2.weight, QUICK * mlp.fc2.bias), alpha=1 / QUICK)
