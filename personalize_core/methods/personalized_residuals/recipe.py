"""The recipe of Personalized Residuals, which can be sampled with localized attention-guided (LAG) sampling.

No code was released; what the paper leaves open is decided in docs/methods.md, and said here and in method.py where it
happens.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Ablation, Recipe, options, refuse_idle
from personalize_core.methods.shared.options import LAG

Target = Literal["proj_out", "proj_in", "to_k", "to_v"]


@options
class Config(Recipe):
    """A residual on a projection of every transformer block, by default on its output projection (eq. 1).

    Defaults are the paper's (sec. 4.1), for Stable Diffusion 1.4; the rest are its ablations (sec. 4.4).
    """

    display_name = "Personalized Residuals"
    learns = "a low-rank residual on each output projection"
    authors = "Ham et al."
    title = "Personalized Residuals for Concept-Driven Text-to-Image Generation"
    venue = "CVPR 2024"
    arxiv = "2405.12978"
    Sampling = LAG

    rank_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05  # rank of a residual, as a share of its output channels
    initial: Literal["base_model", "gaussian"] = "base_model"  # see Residual in method.py
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("proj_out",)  # of every transformer block
    macro_class: bool = True  # does the class noun follow the placeholder?
    # Whose noun that is: the concept's own, or the best of WordNet's by CLIP, as `personalize suggest-class` finds it.
    class_noun: Literal["concept", "suggested"] = "concept"
    train_embedding: bool = False  # is the placeholder's embedding learned too?
    # The paper's regularization images are LAION's; ours are the base model's own, as DreamBooth's (eq. 2 there).
    class_images: Annotated[int, Field(ge=0)] = 0
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    steps: Annotated[int, Field(gt=0)] = 150
    batch_size: Annotated[int, Field(gt=0)] = 4  # as many class images come on top
    lr: Annotated[float, Field(gt=0)] = 1e-3

    ablations = {
        "kv": Ablation({"targets": ["to_k", "to_v"]}, "Personalized Residuals on K+V"),
        "proj_in": Ablation({"targets": ["proj_in"]}, "Personalized Residuals on proj_in"),
        "kv_proj_out": Ablation({"targets": ["to_k", "to_v", "proj_out"]}, "Personalized Residuals on K+V+proj_out"),
        "kv_proj_in_proj_out": Ablation(
            {"targets": ["to_k", "to_v", "proj_in", "proj_out"]}, "Personalized Residuals on K+V+proj_in+proj_out"
        ),
        "without_macro_class": Ablation({"macro_class": False}),
        "wordnet_macro_class": Ablation(
            {"class_noun": "suggested"}, "Personalized Residuals with WordNet's macro class"
        ),
        "regularization_images": Ablation({"class_images": 200}, "Personalized Residuals with regularization images"),
        "token_embedding": Ablation({"train_embedding": True}, "Personalized Residuals with a token embedding"),
        "rank_0.025": Ablation({"rank_fraction": 0.025}, "Personalized Residuals at rank 2.5 %"),
        "rank_0.1": Ablation({"rank_fraction": 0.1}, "Personalized Residuals at rank 10 %"),
        "rank_0.2": Ablation({"rank_fraction": 0.2}, "Personalized Residuals at rank 20 %"),
        "gaussian_start": Ablation({"initial": "gaussian"}, "Personalized Residuals from a Gaussian start"),
    }

    def __post_init__(self) -> None:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets names a projection twice: {', '.join(self.targets)}")
        if not self.macro_class:
            refuse_idle(self, "class_noun", off="macro_class: false")
        if self.suggested_class_noun and self.class_images:
            raise InputError("class_images are of the concept's own class noun; leave out `class_noun: suggested`")
        if not self.class_images:
            refuse_idle(self, "prior_weight", off="class_images: 0")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)

    @property
    def suggested_class_noun(self) -> bool:
        return self.class_noun == "suggested"

    @property
    def samples_by_weights(self) -> bool:
        return True

    @property
    def text_embeddings(self) -> int:
        return int(self.train_embedding)

    @property
    def class_images_needed(self) -> int:
        return self.class_images

    @property
    def starts_as_base_model(self) -> bool:
        return self.initial == "base_model"
