"""The transformer blocks of a U-Net, compiled: the same numbers up to rounding, in fewer and larger kernels.

What methods attach inside a block (hooks, layers that compute otherwise, other weights) is compiled with it. torch
looks at all of it before every call, and compiles again where it is another.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from personalize_core.base_model.attention import TextsOfOneLayer

BLOCK: Any = BasicTransformerBlock.forward
ARGUMENTS = tuple(inspect.signature(BLOCK).parameters)[1:]
# Of each block: one for each thing that is attached, shape of a batch, and pass with or without a gradient. Where much
# is done in one process, more would be searched through before every call.
MOST_VARIANTS = 64
TOO_MANY = (
    "%s has been compiled for %d batch shapes and things attached, the most that are kept. It goes on without being "
    "compiled, with the same result and more slowly, until the next training or sampling."
)


class CompiledBlocks:
    """Compiled code for transformer blocks. Outside of `in_place` there is no trace of it in them.

    Each block is traced whole (`fullgraph`), so that no part of it is silently left to Python, and has code of its own,
    which goes when this object does. Where a block has `MOST_VARIANTS` variants and needs another, that is said, and
    from there on this block is computed without being compiled: see `gave_up`.

    Args:
        blocks: layer -> block, in the order they run.
        backend: of torch.compile; what makes code of the operations.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], backend: str) -> None:
        self.backend, self.gave_up = backend, False
        self._forwards = {
            block: self._forward(block, index, layer) for index, (layer, block) in enumerate(blocks.items())
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the blocks are compiled when they are first called, and then computed so."""
        with torch._dynamo.config.patch(
            skip_nnmodule_hook_guards=False,  # else what a method attached would act on after it has been taken out
            accumulated_recompile_limit=2 * MOST_VARIANTS,  # one for all that shares code; here nothing does
        ):
            for block, forward in self._forwards.items():
                block.forward = forward
            try:
                yield
            finally:
                for block in self._forwards:
                    del block.forward  # the method of its class is seen again

    def _forward(self, block: nn.Module, index: int, layer: str) -> Callable[..., Tensor]:
        compile_: Any = torch.compile  # its overloads do not name every option
        compiled: Callable[..., Tensor] | None = compile_(
            _with_own_code(BLOCK), backend=self.backend, fullgraph=True, dynamic=False, recompile_limit=MOST_VARIANTS
        )

        def forward(*in_order: Any, **by_name: Any) -> Tensor:
            nonlocal compiled
            given = dict(zip(ARGUMENTS, in_order, strict=False)) | by_name
            if compiled is None:
                return BLOCK(block, **given)
            call = given["cross_attention_kwargs"]["call"]
            own = TextsOfOneLayer(call.texts(index))
            changed = {"cross_attention_kwargs": {"call": own}, "encoder_hidden_states": None}  # texts come with calls
            try:
                output = compiled(block, **given | changed)
            except FailOnRecompileLimitHit:  # nothing has been computed yet
                compiled, self.gave_up = None, True
                _log.warning(TOO_MANY, layer, MOST_VARIANTS)
                return BLOCK(block, **given)
            assert own.query_key
            call.saw(layer, *own.query_key)
            return output

        return forward


def _with_own_code(function: Any) -> Any:
    """A copy. torch keeps what it compiled with a function's code, which all blocks would share."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_log = logging.getLogger(__name__)
