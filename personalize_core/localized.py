"""Where in a picture a method's change may act: localized attention-guided (LAG) sampling.

Ham et al., "Personalized Residuals for Concept-Driven Text-to-Image Generation", CVPR 2024, arXiv:2405.12978,
sec. 3.3, for one concept. For several concepts in one picture, which the paper leaves for later (sec. 5), the rule
is ours: a location belongs to a concept if LAG says so, and no other concept is looked at more strongly there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from personalize_core.base import Call

Unconditional = Literal["reuse", "off", "full"]
"""What the prompt-free half of guidance does, which the paper does not say: reuse the mask of the same picture's
prompted half, have the change off, or have it act in full."""


def region(call: Call, layer: str, place: int, unconditional: Unconditional) -> Tensor:
    """M of eq. 3, (B, h*w) bool: where the change of one concept acts.

    Args:
        call: the pass that is running; the layer's cross-attention has run in it.
        place: which of the context's concepts; 0 where there is only one.
    """
    own = belongs([call.maps.on(layer, words) for words in call.context.concepts], place)
    match unconditional:
        case "reuse":
            return own[call.context.partner]
        case "off":
            return own & ~call.context.unconditional[:, None]
        case "full":
            return own | call.context.unconditional[:, None]


def belongs(attention: list[Tensor], place: int) -> Tensor:
    """(B, h*w) bool from how much each location looks at each concept, (B, h*w) each; a tie goes to the first.

    Concepts are compared by attention relative to their own mean over the picture: a class noun of three tokens, or
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
    return attention > attention.median(dim=-1, keepdim=True).values


def localized(inside: Tensor, original: Tensor, change: Tensor) -> Tensor:
    """(1 - M) f + M f' (eq. 3): where M is False, not one bit of the base model's features changes.

    Args:
        inside: M, (B, h*w).
        original: f, (B, m, h, w) or (B, h*w, m).
        change: f' - f.
    """
    shape = (len(original), 1, *original.shape[2:]) if original.ndim == 4 else (*inside.shape, 1)
    return torch.where(inside.view(shape), original + change, original)
