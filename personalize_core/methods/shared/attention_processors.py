"""The public format of Custom Diffusion: weights of the cross-attention as diffusers' processors. Safetensors only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from personalize_core.errors import InputError, shown
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.shared.interchange import PROCESSORS, check_no_matrix_is_zero, file_in, read_tensors

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel

_IN_PROCESSOR = re.compile(r"(?P<layer>.+\.attn2)\.processor\.(?P<projection>.+)_custom_diffusion\.(?P<rest>.+)")


def save_processors(weights: Iterable[tuple[str, Tensor]], base: BaseModel, folder: Path) -> str:
    """Write weights of the cross-attention, by their names in the U-Net; returns how diffusers loads them."""
    # The format asks for every attention layer; an empty tensor says that a layer is as it was.
    tensors = {name: torch.zeros(0) for name in base.unet.attn_processors if ".attn1." in name}
    for name, weight in weights:
        path, inside = name.split(".attn2.")
        projection, rest = inside.split(".", 1)
        tensors[f"{path}.attn2.processor.{projection}_custom_diffusion.{rest}"] = weight
    save_tensors(folder / PROCESSORS, tensors)
    return (
        f'pipe.unet.load_attn_procs(FOLDER, weight_name="{PROCESSORS}", '
        "_pipeline=pipe), where diffusers 0.42.1 without _pipeline reads the file and then does nothing"
    )


def read_processors(path: Path) -> dict[str, Tensor]:
    """The weights of such a file, or of the one in a folder, in float32, by their names in the U-Net.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    tensors, file = {}, file_in(path, PROCESSORS)
    for name, tensor in read_tensors(file, exempt=[".attn1.processor"]).items():
        if match := _IN_PROCESSOR.fullmatch(name):
            tensors["{layer}.{projection}.{rest}".format(**match.groupdict())] = tensor.float()
        elif tensor.numel():
            raise InputError(f"{file} holds {shown(name)}, which is no weight of Custom Diffusion; import another")
    check_no_matrix_is_zero(tensors, file)
    return tensors
