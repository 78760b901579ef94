"""Custom Diffusion's recipe.

The augmentation, its mask and the stop at the start token are in the authors' code (adobe-research/custom-diffusion),
which we follow; where diffusers' port of it differs, that is said below and in method.py. One concept: joint training
and merging are not built.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Ablation, Recipe, options, refuse_idle
from personalize_core.methods.shared.options import LAG


@options
class Sampling(LAG):
    """How a trained artifact is used."""

    # As many as make up this share of their sum (the authors' compress.py takes 0.6); 1 leaves each change whole.
    keep: Annotated[float, Field(gt=0, le=1, description="cuts each learned change to its leading singular values")] = (
        1.0
    )


@options
class Config(Recipe):
    """Keys and values of every cross-attention layer, and the embedding of one new word.

    Defaults are the authors' for Stable Diffusion 1.4, on one GPU with their two GPUs' batch and rate. For faces with
    few images they advise `trained: attn2`, a rate of 4e-5 and 750 steps.
    """

    display_name = "Custom Diffusion"
    learns = "keys and values of the cross-attention, one embedding"
    authors = "Kumari et al."
    title = "Multi-Concept Customization of Text-to-Image Diffusion"
    venue = "CVPR 2023"
    arxiv = "2212.04488"
    Sampling = Sampling

    trained: Literal["kv", "attn2"] = "kv"  # of the cross-attention: keys and values, or all of it
    # Class images: sampled from the base model, images from data/regularization with their captions, or none.
    regularization: Literal["generated", "real", "none"] = "generated"
    class_images: Annotated[int, Field(gt=0)] = 200  # how many are generated
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    # Both codes divide by the sum of a mask of one channel, which makes a masked loss of four channels 4 times its
    # mean. The authors' code does so for all batch items; diffusers' for the concept's alone, which is 4 here.
    instance_scale: Literal[1, 4] = 1
    zoom: bool = True  # the augmentation, with its mask and its words
    detach_start: bool = True  # does the start-of-text token give the keys and values no gradient?
    initial_word: str | None = None  # one token or entry of the vocabulary; None: entry "ktn", else the rare word
    steps: Annotated[int, Field(gt=0)] = 250
    batch_size: Annotated[int, Field(gt=0)] = 4  # as many class images come on top
    lr: Annotated[float, Field(gt=0)] = 8e-5  # 1e-5, scaled by 2 GPUs with 4 images each

    ablations = {  # "kv" is the method itself
        "attn2": Ablation({"trained": "attn2"}, "Custom Diffusion on all of attn2"),
        "without_regularization": Ablation({"regularization": "none", "prior_weight": 1.0, "class_images": 200}),
        "real_regularization": Ablation(
            {"regularization": "real", "class_images": 200}, "Custom Diffusion with real regularization images"
        ),
        "without_zoom": Ablation({"zoom": False}),
    }

    def __post_init__(self) -> None:
        if self.regularization == "none":
            refuse_idle(self, "class_images", "prior_weight", off="regularization: none")
        if self.regularization == "real":  # all images of the folder, however many
            refuse_idle(self, "class_images", off="regularization: real")

    @property
    def preprocessing(self) -> Preprocessing:
        """The authors' centre crop; diffusers' port squashes concept images instead."""
        zoomed = Preprocessing("zoom", "bicubic", flip=True)
        return zoomed if self.zoom else zoomed.of_class_images

    @property
    def samples_by_weights(self) -> bool:
        return True

    @property
    def text_embeddings(self) -> int:
        return 1

    @property
    def class_images_needed(self) -> int:
        return self.class_images if self.regularization != "none" else 0

    @property
    def real_class_images(self) -> bool:
        return self.regularization == "real"
