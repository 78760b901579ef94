"""Copies of some of a model's weights that take the originals' place for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from personalize_core.methods.shared.layer_modules import path_of, stored


class TunedWeights(nn.Module):
    """Trainable float32 copies of some of a model's tensors, put in the originals' place for a while.

    The originals are never written to, so the base model comes out bit for bit as it went in; the price is a
    second copy in memory.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        originals = dict(model.named_parameters())
        self.weights = nn.ParameterDict(
            {stored(name): nn.Parameter(originals[name].detach().clone().float()) for name in names}
        )

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, weight)."""
        return ((path_of(key), weight) for key, weight in self.weights.items())

    @contextmanager
    def placed_in(self, model: nn.Module, under: str = "") -> Iterator[None]:
        """Within it, `model` computes with these weights, and gradients reach them; those whose names start so."""
        with _placed(((name, weight) for name, weight in self.items() if name.startswith(under)), model):
            yield

    def as_state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names they have in the model."""
        return {name: weight.detach() for name, weight in self.items()}


class KeptWeights(nn.Module):
    """A copy of some of a model's tensors as they were at one moment of training; buffers, so nothing trains them."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        originals = dict(model.named_parameters())
        for name in names:
            self.register_buffer(stored(name), originals[name].detach().clone().float())

    def keep(self, tuned: TunedWeights) -> None:
        """Copy the tensors as they are now."""
        now = tuned.as_state_dict()
        for key, kept in self.named_buffers():
            kept.copy_(now[path_of(key)])

    @contextmanager
    def placed_in(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` computes with these weights."""
        with _placed(((path_of(key), kept) for key, kept in self.named_buffers()), model):
            yield


@contextmanager
def _placed(weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[None]:
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, weight in weights:
            path, _, leaf = name.rpartition(".")
            owner: Any = model.get_submodule(path)
            originals.append((owner, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = weight
        yield
    finally:
        for owner, leaf, original in originals:
            owner._parameters[leaf] = original


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
