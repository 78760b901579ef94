"""A module of a method's own for each of some layers of the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from personalize_core.base_model.model import BaseModel

M = TypeVar("M", bound=nn.Module)


def stored(path: str) -> str:
    """The name under which torch keeps what belongs to a path in the U-Net: a name may not hold a dot."""
    return path.replace(".", "/")


def path_of(name: str) -> str:
    """The opposite of `stored`."""
    return name.replace("/", ".")


class LayerModules(nn.ModuleDict, Generic[M]):
    """Modules by the path in the U-Net of the layer that each belongs to, e.g. "mid_block.attentions.0.proj_out"."""

    def __init__(self, modules: Mapping[str, M]) -> None:
        super().__init__({stored(path): module for path, module in modules.items()})

    def of(self, path: str) -> M:
        """The module of one layer."""
        return cast(M, self[stored(path)])

    def paths(self) -> list[str]:
        return [path_of(name) for name in self]

    def by_path(self) -> Iterator[tuple[str, M]]:
        return ((path_of(name), cast(M, module)) for name, module in self.items())

    def hooks(self, layers: Mapping[str, nn.Module], hook: Callable[[M], Callable]) -> list[RemovableHandle]:
        """Register on each layer the forward hook that `hook` makes of its module.

        Args:
            layers: path -> layer, of those whose modules are to act.
        """
        return [layer.register_forward_hook(hook(self.of(path))) for path, layer in layers.items()]


@contextmanager
def computing(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within it, each of the layers computes what is given for it; its hooks act as ever."""
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward  # the method of its class is seen again


def attention_projections(base: BaseModel, transformers: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """Path in the U-Net -> layer: queries, keys, values and outputs of both attentions, in some transformers or all."""
    found = {}
    for block in base.blocks_of(transformers):
        for kind in ("attn1", "attn2"):
            attention = block.module.get_submodule(kind)
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                found[f"{block.path}.{kind}.{name}"] = attention.get_submodule(name)
    return found
