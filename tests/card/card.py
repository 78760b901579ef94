"""A machine with a pretended card: what libraries ask of torch.cuda, and attention as a card computes it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils import _foreach_utils

from tests.card.guard import WHY_NOT
from tests.card.on_card import Machine, OnCard, aten
from tests.card.watch import WATCH, Watch


@contextmanager
def pretended_card(meta: bool = False) -> Iterator[Watch]:
    """Within it "cuda" is a device that computes on the CPU.

    Args:
        meta: its tensors of floating point have shapes and no values. Memory, waits and FLOPs can then be counted at
            the shapes of a published model.

    Raises:
        RuntimeError: this process cannot have one; the message says why.
    """
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    changed: Any = torch._C
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    # A parameter of the CPU cannot take over the data of one on the card: Module.to puts new ones in their place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    changed._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") reaches the Machine
    try:
        # Backward runs in this thread, where the Machine is.
        with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
            _let_torch_find_it(patch)
            _let_optimizers_take_cudas_paths(patch)
            _let_wrappers_be_inferred(patch)
            patch.setattr(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
            with warnings.catch_warnings(), Machine(meta):
                warnings.simplefilter("ignore")  # torch's, about its own meta kernels
                yield WATCH
    finally:
        changed._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _let_torch_find_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *options: True)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "get_device_name", lambda *device: "a pretended card")
    patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *device: WATCH.restart())
    patch.setattr(torch.cuda, "max_memory_allocated", lambda *device: WATCH.peak.size)
    patch.setattr(torch.cuda, "Event", PassedEvent)


class PassedEvent:
    """An event of a stream that has done everything at once."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _let_wrappers_be_inferred(patch: pytest.MonkeyPatch) -> None:
    """In inference mode torch refuses views of tensors like OnCard; without gradients they compute the same."""
    entered: list[torch.no_grad] = []

    def enter(mode: torch.inference_mode) -> None:
        entered.append(torch.no_grad())
        entered[-1].__enter__()

    def leave(mode: torch.inference_mode, *failure: Any) -> None:
        entered.pop().__exit__(*failure)

    patch.setattr(torch.inference_mode, "__enter__", enter)
    patch.setattr(torch.inference_mode, "__exit__", leave)


def _let_optimizers_take_cudas_paths(patch: pytest.MonkeyPatch) -> None:
    """torch decides by the type of a tensor, and would take OnCard for one that no fast path can handle."""
    has_foreach = _foreach_utils._has_foreach_support

    def supports(tensors: list[Tensor], device: torch.device) -> bool:
        return device.type == "cuda" or has_foreach(tensors, device)

    adam = importlib.import_module("torch.optim.adam")  # torch.optim hides its modules
    choose = adam._default_to_fused_or_foreach

    def chosen(params: list[Tensor], differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
        on_card = bool(params) and isinstance(params[0], OnCard)
        return (False, True) if on_card else choose(params, differentiable, use_fused)

    for module in (_foreach_utils, clip_grad):
        patch.setattr(module, "_has_foreach_support", supports)
    patch.setattr(adam, "_default_to_fused_or_foreach", chosen)


def _attention(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel that `scaled_dot_product_attention` chooses on a card since Ampere, for the memory that it takes."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(query, OnCard):
            return on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        has_values = not query.held.is_meta
        if torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(half), key.to(half), value.to(half)
        if has_values:
            how = (attn_mask, dropout_p, is_causal)
            return aten._scaled_dot_product_attention_math(query, key, value, *how, scale=scale)[0]
        if query.dtype == torch.bfloat16 and attn_mask is None:
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        trained = query.requires_grad or key.requires_grad or value.requires_grad
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale)[0]

    return attention
