"""Copies of some of a model's weights that take the originals' place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from personalize_core.methods.shared.layer_modules import path_of, stored

T = TypeVar("T")
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class TunedWeights(nn.Module):
    """Trainable float32 copies of some of a model's tensors, put in the originals' place for a while.

    The originals are never written to, so the base model comes out bit for bit as it went in.

    A graphics card holds as little of it as it can. In training it holds the copies, and the originals lie in the
    CPU's memory while the copies are in their place. Otherwise the copies stay in the CPU's memory, and what takes the
    originals' place has their type: it is made once, and again only after a copy has changed. Vectors, which are few,
    stay in float32 even so, for normalization computes with them in float32.

    Args:
        model: where the originals are.
        names: of its parameters.
        unrounded: values to start from, by name, where the model holds them in less than float32
            (`BaseModel.unrounded`).
    """

    def __init__(self, model: nn.Module, names: Iterable[str], unrounded: Mapping[str, Tensor] = NOTHING) -> None:
        super().__init__()
        copies = _copies(model, names, unrounded)
        self.weights = nn.ParameterDict({stored(name): nn.Parameter(copy) for name, copy in copies})
        self._placed: dict[str, tuple[Tensor, int, Tensor]] = {}  # name -> weight, its version, what takes its place

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, weight)."""
        return ((path_of(key), weight) for key, weight in self.weights.items())

    @contextmanager
    def placed_in(self, model: nn.Module, under: str = "", holding: str = "") -> Iterator[None]:
        """Within it, `model` computes with these weights, and gradients reach them.

        Args:
            under, holding: those whose names start and hold so; by default all.
        """
        if self.training:
            self._placed.clear()
        weights = ((name, weight) for name, weight in self.items() if name.startswith(under) and holding in name)
        with placed(weights, model, self._for):
            yield

    def as_state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names they have in the model."""
        return {name: weight.detach() for name, weight in self.items()}

    def _for(self, name: str, weight: Tensor, original: Tensor) -> Tensor:
        if self.training:
            return weight
        known, version, placed = self._placed.get(name, (None, 0, weight))
        if known is not weight or version != weight._version or placed.device != original.device:
            placed = _like(weight, original)
            if placed is not weight and not placed.requires_grad:
                self._placed[name] = weight, weight._version, placed
        return placed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves a module comes here: not to a graphics card, unless it is to be trained there."""
        if not self.training and fn(torch.empty(0)).device.type not in ("cpu", "meta"):
            return self
        return super()._apply(fn, recurse)


class KeptWeights(nn.Module):
    """A copy of some of a model's tensors as they were at one moment of training; buffers, so nothing trains them."""

    def __init__(self, model: nn.Module, names: Iterable[str], unrounded: Mapping[str, Tensor] = NOTHING) -> None:
        """As `TunedWeights`."""
        super().__init__()
        for name, copy in _copies(model, names, unrounded):
            self.register_buffer(stored(name), copy)

    def keep(self, tuned: TunedWeights) -> None:
        """Copy the tensors as they are now."""
        now = tuned.as_state_dict()
        for key, kept in self.named_buffers():
            kept.copy_(now[path_of(key)])

    @contextmanager
    def placed_in(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` computes with these weights."""
        weights = ((path_of(key), kept) for key, kept in self.named_buffers())
        with placed(weights, model, lambda name, weight, original: _like(weight, original)):
            yield


def _copies(model: nn.Module, names: Iterable[str], unrounded: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """In the CPU's memory, or on the meta device where that is asked for or the model is there."""
    originals = dict(model.named_parameters())
    for name in names:
        value = unrounded.get(name, originals[name]).detach()
        yield name, torch.empty(value.shape, dtype=torch.float32, device="meta" if value.is_meta else None).copy_(value)


def _like(weight: Tensor, original: Tensor) -> Tensor:
    """The weight itself, if it is where the original is and of its type; else a copy that is."""
    return weight.to(original.device, original.dtype if weight.ndim > 1 else weight.dtype)


@contextmanager
def placed(
    replacements: Iterable[tuple[str, T]], model: nn.Module, chosen: Callable[[str, T, Tensor], Tensor]
) -> Iterator[None]:
    """Within it, `model` computes with other tensors in some parameters' place.

    Args:
        replacements: (name of a parameter, what its replacement is made of).
        chosen: (name, what it is made of, original) -> what takes the original's place.
    """
    displaced: list[tuple[Any, str, Callable[[], nn.Parameter]]] = []
    try:
        for name, made_of in replacements:
            path, _, leaf = name.rpartition(".")
            owner: Any = model.get_submodule(path)
            original = owner._parameters[leaf]
            replacement = chosen(name, made_of, original)
            displaced.append((owner, leaf, _put_aside(original, replacement)))
            owner._parameters[leaf] = replacement
        yield
    finally:
        for owner, leaf, original in displaced:
            owner._parameters[leaf] = original()


def _put_aside(original: nn.Parameter, replacement: Tensor) -> Callable[[], nn.Parameter]:
    """What gives the original back. A graphics card does not hold it while what is in its place is trained."""
    device = original.device
    if device.type != "cuda" or not replacement.requires_grad or original.requires_grad or replacement is original:
        return lambda: original
    kept = original.detach().cpu()
    return lambda: nn.Parameter(kept.to(device), requires_grad=False)


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
