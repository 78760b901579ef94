"""What several methods are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class ConceptEmbedding(nn.Module):
    """The learned input embedding of the placeholder, (D,) in float32."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(initial.detach().clone().float())


class TunedWeights(nn.Module):
    """Trainable float32 copies of some of a model's tensors, put in the originals' place for a while.

    The originals are never written to, so the base model comes out bit for bit as it went in; the price is a
    second copy in memory.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        originals = dict(model.named_parameters())
        # A parameter's name may not hold a dot, so "conv_in.weight" is kept as "conv_in/weight".
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(originals[name].detach().clone().float()) for name in names}
        )

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, weight)."""
        return ((key.replace("/", "."), weight) for key, weight in self.weights.items())

    @contextmanager
    def placed_in(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` computes with these weights, and gradients reach them."""
        originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for name, weight in self.items():
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                originals.append((owner, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = weight
            yield
        finally:
            for owner, leaf, original in originals:
                owner._parameters[leaf] = original

    def as_state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names they have in the model."""
        return {name: weight.detach() for name, weight in self.items()}


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def count(module: nn.Module) -> int:
    """How many numbers the module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
