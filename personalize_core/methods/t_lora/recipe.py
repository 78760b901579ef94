"""The recipe of T-LoRA: a low-rank change whose rank falls with the noise."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Ablation, Recipe, options, refuse_idle
from personalize_core.methods.shared.options import LAG


@options
class Config(Recipe):
    """A low-rank change to every attention projection, of which fewer components act the more noise there is.

    Batch size, rate, weight decay and steps are the paper's (appendix B), for Stable Diffusion XL; it compares several
    ranks. `min_rank` and `alpha` are the defaults of the authors' code.
    """

    display_name = "T-LoRA"
    learns = "a low-rank change to each attention projection, masked by the timestep"
    authors = "Soboleva et al."
    title = "T-LoRA: Single Image Diffusion Model Customization Without Overfitting"
    venue = "AAAI 2026"
    arxiv = "2507.05964"
    Sampling = LAG

    rank: Annotated[int, Field(gt=0)] = 64  # a layer narrower than that has its width
    masked: bool = True  # whether the rank falls with the noise; false is the paper's Ortho-LoRA
    min_rank: Annotated[int, Field(ge=0)] = 1  # how many components act at the last timestep
    alpha: Annotated[float, Field(gt=0)] = 1.0  # how the rank falls between: 1 is linear
    orthogonal: bool = True  # whether it starts from singular vectors; false, as LoRA starts, is Vanilla T-LoRA
    steps: Annotated[int, Field(gt=0)] = 800
    batch_size: Annotated[int, Field(gt=0)] = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4

    ablations = {
        "vanilla": Ablation({"orthogonal": False, "steps": 500}, "Vanilla T-LoRA"),
        "ortho_lora": Ablation({"masked": False, "min_rank": 1, "alpha": 1.0}, "Ortho-LoRA"),
    }

    def __post_init__(self) -> None:
        if not self.masked:
            refuse_idle(self, "min_rank", "alpha", off="masked: false")
        if self.min_rank > self.rank:
            raise InputError(f"min_rank = {self.min_rank} is more than rank = {self.rank}; lower it")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)
