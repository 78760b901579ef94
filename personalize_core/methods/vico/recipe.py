"""ViCo's recipe: a visual condition beside the text.

We follow the authors' code throughout. Summaries of the paper describe an image encoder for the reference; there is
none, it goes through the U-Net itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Ablation, Recipe, options, refuse_idle
from personalize_core.methods.shared.options import LAG, TokenRule


@options
class Sampling(LAG):
    """How a trained artifact is used."""

    # Of the concept's images in their files' order, from 0.
    reference: Annotated[int, Field(ge=0, description="chooses the concept image that is attended to")] = 0
    # Its "own" map, at the placeholder's position in the prompt, where it has padding, as in the authors' code; or the
    # mask of the prompted half.
    uncond_mask: Annotated[
        Literal["own", "from_cond"],
        Field(description="says by which map the prompt-free half of guidance masks the reference"),
    ] = "own"


@options
class Config(Recipe):
    """Four transformer blocks that attend to a reference concept image, and the placeholder's embedding.

    Defaults are those of the authors' code, for Stable Diffusion 1.4. Its rate for the embedding is 5e-3 x cards x
    images on each, here for the README's 4 x 1. Its limit is 510 steps; the checkpoints it publishes and samples are
    those of 300 to 400.
    """

    display_name = "ViCo"
    learns = "one embedding, four image-attention blocks"
    authors = "Hao et al."
    title = "ViCo: Plug-and-play Visual Condition for Personalized Text-to-image Generation"
    arxiv = "2306.00971"
    Sampling = Sampling

    image_attention: bool = True  # the blocks that attend to the reference
    # How a block takes in the reference: it attends to it, or, for comparison, it has the reference's features of the
    # same place put beside its own, or added to them, in a linear layer.
    joining: Literal["attention", "concatenation", "addition"] = "attention"
    mask: bool = True  # attend to the concept in the reference alone
    regularizer: Annotated[float, Field(ge=0)] = 5e-4  # weight of the loss that lets the placeholder look where
    # the end-of-text token looks
    steps: Annotated[int, Field(gt=0)] = 400
    batch_size: Annotated[int, Field(gt=0)] = 4
    embedding_lr: Annotated[float, Field(gt=0)] = 2e-2
    lr: Annotated[float, Field(gt=0)] = 1e-5  # of the blocks
    templates: str = "ti_object_81"  # training prompts; the concept alone stands in their slot
    class_token_rule: TokenRule = "last"  # the embedding starts from this token of the class noun

    ablations = {
        "without_image_attention": Ablation({"image_attention": False, "lr": 1e-5}),
        "concatenation": Ablation({"joining": "concatenation"}, "ViCo with concatenation"),
        "addition": Ablation({"joining": "addition"}, "ViCo with addition"),
        "without_mask": Ablation({"mask": False}),
        "without_regularizer": Ablation({"regularizer": 0.0}),
    }

    def __post_init__(self) -> None:
        if not self.mask and not self.image_attention:
            raise InputError("mask: false leaves the mask out of image attention, which image_attention: false has not")
        if not self.image_attention:
            refuse_idle(self, "lr", "joining", off="image_attention: false")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("squash", "bicubic", flip=False)

    @property
    def text_embeddings(self) -> int:
        return 1

    @property
    def starts_as_base_model(self) -> bool:
        return False  # its blocks start at random, with nothing that closes them

    @property
    def samples_as_it_trains(self) -> bool:
        return not self.image_attention  # the reference is another concept image in each training step

    def check(self, sampling: Sampling) -> None:
        if sampling != type(sampling)() and not self.image_attention:
            raise InputError(
                "without image attention there is no reference to choose or to mask, and nothing for lag to confine; "
                "leave these options out"
            )
        if sampling.uncond_mask != "own" and not self.mask:
            raise InputError(f"uncond_mask: {sampling.uncond_mask} chooses a mask, but it was trained with mask: false")

    def images_needed(self, sampling: Sampling) -> int:
        return sampling.reference + 1
