"""Which operations have no deterministic kernel on a GPU, so that torch refuses them there; found without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# "will throw a RuntimeError", of what https://docs.pytorch.org/docs/2.13/generated/torch.use_deterministic_algorithms.html
# lists, by the names of the operations beneath.
REFUSED = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward", "put", "put_", "histc"),
    *("median", "nanmedian", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward"),
}
REFUSED_FOR_FLOATS = {"cumsum", "cumsum_", "bincount"}  # the last with weights


class OnlyDeterministic(TorchDispatchMode):
    """Within it, an operation that torch would refuse on a GPU in deterministic mode raises AssertionError."""

    def __torch_dispatch__(self, operation: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        name = operation.overloadpacket.__name__
        of_floats = name in REFUSED_FOR_FLOATS and any(
            isinstance(value, torch.Tensor) and value.is_floating_point() for value in given
        )
        assert name not in REFUSED and not of_floats, f"{operation} has no deterministic kernel on a GPU"
        return operation(*given, **(named or {}))
