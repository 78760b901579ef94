"""What the text encoders say of prompts, kept while nothing that it depends on changes.

Most methods train nothing that the text depends on, and read few prompts over and over.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

MOST_PROMPTS = 256  # of each base model; a prompt takes 0.23 MiB at the width of Stable Diffusion 1, 0.30 at that of 2

V = TypeVar("V")


class Recent(Generic[V]):
    """The values that were used last, at most so many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def keep(self, key: Hashable, value: V) -> V:
        """Returns the value."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._most:
            self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        self._values.clear()


class Sameness:
    """Is a tensor still the one that was seen, with the values that it had? It does not keep the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    def of(self, tensor: Tensor) -> bool:
        return self._tensor() is tensor and self._version == tensor._version


class KeptPrompts(Generic[V]):
    """What text encoders said of each prompt, as long as it would say it again.

    It forgets all once a weight of an encoder is another, or has other values: methods put weights of their own in
    the place of the encoders' for a while.
    """

    def __init__(self, encoders: nn.Module) -> None:
        self._modules: list[Any] = list(encoders.modules())
        self._owners = [(module._parameters, name) for module in self._modules for name in module._parameters]
        self._weights: list[Sameness] = []
        self._said: Recent[tuple[Sameness | None, V]] = Recent(MOST_PROMPTS)

    @property
    def hooked(self) -> bool:
        """Does a hook change what the encoders compute? Nobody knows then what it depends on."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    @property
    def trained(self) -> bool:
        """Does a gradient reach the encoders' weights?"""
        weights = (owner[name] for owner, name in self._owners)
        return torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)

    def get(self, key: Hashable, embedding: Tensor | None) -> V | None:
        """None if it is not known.

        Args:
            embedding: what the placeholder reads; None where that is the encoders' own, or there is no placeholder.
        """
        self._forget_if_changed()
        same, said = self._said.get(self._key(key, embedding)) or (None, None)
        return said if same is None or (embedding is not None and same.of(embedding)) else None

    def keep(self, key: Hashable, embedding: Tensor | None, said: V) -> V:
        """Returns `said`."""
        same = None if embedding is None else Sameness(embedding)
        return self._said.keep(self._key(key, embedding), (same, said))[1]

    def clear(self) -> None:
        self._said.clear()

    def _key(self, key: Hashable, embedding: Tensor | None) -> Hashable:
        return key, None if embedding is None else id(embedding), torch.backends.cuda.matmul.allow_tf32

    def _forget_if_changed(self) -> None:
        weights = [weight for owner, name in self._owners if (weight := owner[name]) is not None]
        known = self._weights
        if len(known) != len(weights) or not all(same.of(now) for same, now in zip(known, weights, strict=True)):
            self._said.clear()
            self._weights = [Sameness(weight) for weight in weights]
