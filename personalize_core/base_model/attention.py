"""Cross-attention: what each layer reads, and where it looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from personalize_core.base_model.layers import Pool, transformer_of
from personalize_core.base_model.text import TextContext


class AttentionMaps:
    """The cross-attention maps of one U-Net call, computed only when read.

    The layers leave their queries and keys here and go on as if nobody were watching, so recording can never
    change an image. Reading gives probabilities in float32 that carry gradient, so a loss may be put on them.

    Args:
        latest_only: keep those of the transformer that ran last, for hooks inside the U-Net, which ask for no other.
    """

    def __init__(self, latest_only: bool = False) -> None:
        self.latest_only = latest_only
        self._query_key: dict[str, tuple[Tensor, Tensor]] = {}

    def record(self, layer: str, query: Tensor, key: Tensor) -> None:
        """query: (B, heads, h*w, d). key: (B, heads, L, d)."""
        if self.latest_only and any(transformer_of(kept) != transformer_of(layer) for kept in self._query_key):
            self._query_key.clear()
        self._query_key[layer] = query, key

    def include(self, others: AttentionMaps, rows: slice | Tensor, names: Mapping[str, str] | None = None) -> None:
        """Take over some rows of other maps, of all layers or of those in `names`, under the names given there."""
        for layer, (query, key) in others._query_key.items():
            if names is None or layer in names:
                self.record(names[layer] if names else layer, query[rows], key[rows])

    def behind(self, others: AttentionMaps) -> AttentionMaps:
        """Maps of as many rows as both have, the others' first."""
        both = AttentionMaps()
        for layer, (query, key) in self._query_key.items():
            first_query, first_key = others._query_key[layer]
            both.record(layer, torch.cat([first_query, query]), torch.cat([first_key, key]))
        return both

    def __getitem__(self, layer: str) -> Tensor:
        """softmax(Q K^T / sqrt(d)), (B, heads, h*w, L); sums to 1 over the L tokens."""
        return _probabilities(*self._query_key[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._query_key)

    def __len__(self) -> int:
        return len(self._query_key)

    def on(self, layer: str, tokens: Tensor) -> Tensor:
        """How much each location looks at `tokens` (B, L) bool: (B, h*w), in [0, 1].

        The mean over the heads, summed over the tokens. Where a gradient is wanted, the map is computed again
        in backward rather than kept: only one layer's (B, heads, h*w, L) then exists at a time.
        """
        return _map_not_kept(_looked_at, *self._query_key[layer], tokens)

    def on_within(self, transformer: str, tokens: Tensor) -> Tensor:
        """As `on`, the mean over the layers of one transformer, by its path."""
        looked = [self.on(layer, tokens) for layer in self if transformer_of(layer) == transformer]
        return looked[0] if len(looked) == 1 else torch.stack(looked).mean(dim=0)

    def means(self, layers: Sequence[str], pool: Pool) -> Tensor:
        """Mean of the maps over heads and locations, (G, B, L), with layers and `pool` as in `statistics`.

        It costs half of what `statistics` does. As in `on`, only one layer's map exists at a time.
        """
        means = torch.stack([_map_not_kept(_mean, *self._query_key[layer]) for layer in layers])  # (layers, B, L)
        if pool == "layer":
            return means
        sizes = self.sizes(layers, means.device)
        return (sizes * means).sum(dim=0, keepdim=True) / sizes.sum()

    def statistics(self, layers: Sequence[str], columns: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of J columns of the maps over heads and locations, each (G, B, J).

        As in `on`, only one layer's map exists at a time.

        Args:
            layers: whose maps.
            columns: (B, L, J), or (1, L, J) for all rows: column j of row b is the tokens' columns, summed with the
                weights columns[b, :, j].
            pool: over which values together. "layer": those of each layer, G = len(layers);
                "all": those of all layers at once, where large layers count more, G = 1.
        """
        parts = [_map_not_kept(_spread, *self._query_key[layer], columns) for layer in layers]
        means, squares = (torch.stack(part) for part in zip(*parts, strict=True))  # (layers, B, J)
        sizes = self.sizes(layers, means.device)
        if pool == "all":  # squares around the common mean: within the layers, and between them
            mean = (sizes * means).sum(dim=0, keepdim=True) / sizes.sum()
            squares = (squares + sizes * (means - mean).pow(2)).sum(dim=0, keepdim=True)
            means, sizes = mean, sizes.sum(dim=0, keepdim=True)
        return means, squares / (sizes - 1).clamp(min=1)

    def sizes(self, layers: Sequence[str], device: torch.device) -> Tensor:
        """(layers, 1, 1): how many values a token's map has, heads times locations."""
        queries = [self._query_key[layer][0] for layer in layers]
        return torch.tensor([[[q.shape[1] * q.shape[2]]] for q in queries], device=device)


def by_transformer(values: Tensor, layers: Sequence[str]) -> Tensor:
    """(layers, ...) -> (transformers, ...): the mean within each transformer; as it is, where each has one layer.

    Args:
        layers: in the order they run, so that those of a transformer stand together.
    """
    transformers = [transformer_of(layer) for layer in layers]
    counts = [transformers.count(each) for each in dict.fromkeys(transformers)]
    if len(counts) == len(layers):
        return values
    return torch.stack([part.mean(dim=0) for part in values.split(counts)])


@dataclass
class Call:
    """One pass through the U-Net, for the hooks that act inside it."""

    t: Tensor  # (B,)
    context: TextContext
    maps: AttentionMaps = field(default_factory=AttentionMaps)
    rows: slice | None = None  # which rows of the training batch these are; None: all

    def texts(self, index: int) -> tuple[Tensor, Tensor]:
        """What layer `index` takes keys from, and values from: (B, L, D) each."""
        return self.context.layer(index)

    def saw(self, layer: str, query: Tensor, key: Tensor) -> None:
        """Tells where a layer looked; as `AttentionMaps.record`."""
        self.maps.record(layer, query, key)


class TextsOfOneLayer:
    """In a call's place, for one cross-attention layer: what it reads, and where it looked.

    A layer that is compiled then depends neither on its name nor on what other layers left behind.
    """

    def __init__(self, texts: tuple[Tensor, Tensor]) -> None:
        self._texts = texts
        self.query_key: tuple[Tensor, Tensor] | None = None

    def texts(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Call`."""
        return self._texts

    def saw(self, layer: str, query: Tensor, key: Tensor) -> None:
        """See `Call`."""
        self.query_key = query, key


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """In float32: half precision loses the small differences that losses look at.

    Some maps are read while the U-Net predicts, where autocast would cast the product back.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)


def _map_not_kept(compute: Callable, query: Tensor, key: Tensor, *given: Tensor) -> Any:
    """compute(query, key, *given), which draws nothing at random; again in backward, where a gradient is wanted."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return checkpoint(compute, query, key, *given, use_reentrant=False, preserve_rng_state=False)
    return compute(query, key, *given)


def _mean(query: Tensor, key: Tensor) -> Tensor:
    return _probabilities(query, key).mean(dim=(1, 2))


def _looked_at(query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    return (_probabilities(query, key).mean(dim=1) * tokens[:, None]).sum(dim=-1)


def _spread(query: Tensor, key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over heads and locations, (B, J), and the sum of squares around it."""
    with torch.autocast(query.device.type, enabled=False):
        values = _probabilities(query, key) @ columns[:, None].float()  # (B, heads, h*w, J)
    mean = values.mean(dim=(1, 2))
    return mean, (values - mean[:, None, None]).pow(2).sum(dim=(1, 2))


class CrossAttention:
    """The attention processor of one cross-attention layer.

    It knows the layer by name, not by counting calls: a count goes wrong as soon as a forward pass is
    repeated, as gradient checkpointing does.
    """

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index

    def __call__(
        self,
        attn: Any,  # diffusers' Attention
        hidden_states: Tensor,  # (B, h*w, C)
        encoder_hidden_states: Tensor | None = None,  # not used: the text comes with the call
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        call: Call | TextsOfOneLayer,
    ) -> Tensor:
        text_for_keys, text_for_values = call.texts(self.index)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(text_for_keys).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(text_for_values).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        call.saw(self.name, query, key)
        attended = F.scaled_dot_product_attention(query, key, value)
        projection, dropout = attn.to_out
        return dropout(projection(attended.transpose(1, 2).flatten(2)))


class SelfAttention(AttnProcessor2_0):
    """The stock processor; it only accepts the argument that diffusers hands to every processor alike."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, call: Call | None = None, **kwargs) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs)


def check_plain(name: str, layer: Attention) -> None:
    """Raise unless the layer is the plain cross-attention of Stable Diffusion, which is all that is computed here."""
    extras = {
        "norm_cross": layer.norm_cross,
        "group_norm": layer.group_norm,
        "spatial_norm": layer.spatial_norm,
        "norm_q": layer.norm_q,
        "norm_k": layer.norm_k,
        "residual_connection": layer.residual_connection,
        "rescale_output_factor": layer.rescale_output_factor != 1,
    }
    present = [extra for extra, value in extras.items() if value]
    if present:
        raise ValueError(
            f"cross-attention layer {name} has {', '.join(present)}, which Stable Diffusion 1 and 2 have not"
        )
