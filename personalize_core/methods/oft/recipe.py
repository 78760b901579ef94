"""The recipe of orthogonal fine-tuning (OFT), and its constrained form (COFT).

Where the paper and the authors' code differ, we follow the code, except in the number of steps and in the word that
stands for the concept: the base model's rare word, as for every method, where the code has "qwe".
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Ablation, options
from personalize_core.methods.shared.options import LAG, PriorPreservationRecipe

EPS = 6e-5


@options
class Config(PriorPreservationRecipe):
    """A rotation of the input of every attention projection; angles between neurons stay as they were.

    Defaults are the paper's, for Stable Diffusion 1.5. Of the steps the paper says about 1,000; the authors' script
    trains 10,005 and keeps the checkpoint with the best validation score. We follow the paper, and select nothing.
    """

    display_name = "OFT"
    learns = "a rotation for each attention projection"
    authors = "Qiu et al."
    title = "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"
    venue = "NeurIPS 2023"
    arxiv = "2306.07280"
    Sampling = LAG

    r: Annotated[int, Field(gt=0)] = 4  # diagonal blocks of a rotation: how many, not how large
    coft: bool = False  # keep every block near the identity
    eps: Annotated[float, Field(ge=0)] = EPS  # how near; see Rotation.constrain in method.py
    block_share: bool = False  # one block, repeated r times
    rescaled: bool = False  # also learn a positive factor for each output neuron
    prior_preservation: bool = True
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    class_images: Annotated[int, Field(gt=0)] = 200
    steps: Annotated[int, Field(gt=0)] = 1000
    batch_size: Annotated[int, Field(gt=0)] = 1  # as many class images come on top
    lr: Annotated[float, Field(gt=0)] = 6e-5

    ablations = {
        "r_2": Ablation({"r": 2}, "OFT with r = 2"),
        "r_8": Ablation({"r": 8}, "OFT with r = 8"),
        "r_16": Ablation({"r": 16}, "OFT with r = 16"),
        "coft": Ablation({"coft": True}, "COFT"),
        "coft_eps_0.0006": Ablation({"coft": True, "eps": 6e-4}, "COFT with eps = 6e-4"),  # ten times the published
        "block_share": Ablation({"block_share": True}, "OFT with a shared block"),
        "rescaled": Ablation({"rescaled": True}, "OFT with learned magnitudes"),
    }

    def __post_init__(self) -> None:
        if self.eps != EPS and not self.coft:
            raise InputError(f"eps = {self.eps} bounds the rotations of COFT, which is off; add `coft: true`")
        super().__post_init__()

    @property
    def samples_by_weights(self) -> bool:
        return True

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)
