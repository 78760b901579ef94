"""Where in an image a method's change may act: localized attention-guided (LAG) sampling.

Ham et al., "Personalized Residuals for Concept-Driven Text-to-Image Generation", CVPR 2024, arXiv:2405.12978,
sec. 3.3, for one concept and for residuals on output projections. Two things here are ours. The paper leaves several
concepts in one image for later (sec. 5); a location then belongs to a concept if LAG says so, and no other concept
is looked at more strongly there. And eq. 3 asks only for features f without and f' with the change, and for where the
concept is looked at, so it serves every method whose changes inside the U-Net lie within its transformers: `attached`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from personalize_core.base_model.attention import AttentionMaps, Call
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.options import Unconditional


def apart(method: Method) -> bool:
    """Must its changes be kept apart from the base model's weights? In training, and where LAG chooses between both."""
    return method.training or method.sampling.lag


@contextmanager
def attached(base: BaseModel, method: Method, inside: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Attach a method whose every change inside the U-Net lies within a transformer; under LAG, in its region alone.

    There f and f' of eq. 3 are what a transformer answers to the same input without and with the change, so under LAG
    each runs twice. The region is that of the run without: it is known before any change acts, and it is one for all
    concepts of an image. A change to nothing but proj_out, the paper's, needs no second run; see `localized`.

    Args:
        inside: path of a transformer -> the method's changes to it, which are taken out again on leaving.
    """
    confined = not method.training and method.sampling.lag
    with ExitStack() as stack:
        for path, transformer in base.transformers.items():
            if confined:
                hook = _choosing(base, method, path, inside)
                stack.enter_context(hooked(transformer.register_forward_hook(hook, with_kwargs=True)))
            else:
                stack.enter_context(inside(path))
        yield


def _choosing(
    base: BaseModel, method: Method, path: str, inside: Callable[[str], AbstractContextManager[Any]]
) -> Callable:
    def choose(transformer: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor]) -> tuple[Tensor]:
        here = region(base.call, path, method.place, method.sampling.lag_unconditional)
        unseen = replace(base.call, maps=AttentionMaps())  # the maps of this call stay those of the run without
        with inside(path):
            (changed,) = transformer.forward(*args, **kwargs | {"cross_attention_kwargs": {"call": unseen}})
        return (localized(here, output[0], changed),)

    return choose


@torch.no_grad()
def region(call: Call, transformer: str, place: int, unconditional: Unconditional) -> Tensor:
    """M of eq. 3, (B, h*w) bool: where the change of one concept acts.

    Args:
        call: the pass that is running; the transformer's cross-attention has run in it.
        transformer: its path. Where it has several cross-attention layers, their mean says where the concept is looked
            at, which is ours: the paper's transformers have one.
        place: which of the context's concepts; 0 where there is only one.
    """
    own = belongs([call.maps.on_within(transformer, words) for words in call.context.concepts], place)
    match unconditional:
        case "reuse":
            return own[call.context.partner]
        case "off":
            return own & ~call.context.unconditional[:, None]
        case "full":
            return own | call.context.unconditional[:, None]


def belongs(attention: list[Tensor], place: int) -> Tensor:
    """(B, h*w) bool from how much each location looks at each concept, (B, h*w) each; a tie goes to the first.

    Concepts are compared by attention relative to their own mean over the image: a class noun of three tokens, or
    a word that is looked at everywhere, would win every location by the plain sum.
    """
    inside = above_median(attention[place])
    relative = [looked / looked.mean(dim=-1, keepdim=True).clamp_min(1e-12) for looked in attention]
    own = relative[place]
    for other, looked in enumerate(relative):
        if other < place:
            inside = inside & (own > looked)
        if other > place:
            inside = inside & (own >= looked)
    return inside


def above_median(attention: Tensor) -> Tensor:
    """(B, h*w) to bool, strictly above. A row that looks nowhere at the concept is all False."""
    lower_middle = (attention.shape[-1] - 1) // 2  # as torch.median, which has no deterministic kernel on a GPU
    return attention > attention.sort(dim=-1).values[..., lower_middle, None]


def localized(inside: Tensor, original: Tensor, changed: Tensor) -> Tensor:
    """(1 - M) f + M f' (eq. 3), to the bit: where M is False nothing is changed, and where it is True all is.

    Args:
        inside: M, (B, h*w).
        original: f, (B, m, h, w) or (B, h*w, m).
        changed: f', of the same shape.
    """
    shape = (len(original), 1, *original.shape[2:]) if original.ndim == 4 else (*inside.shape, 1)
    return torch.where(inside.view(shape), changed.to(original.dtype), original)
