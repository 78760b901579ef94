"""The recipe of CoRe: context-regularized text embedding learning.

The first version of the paper holds the hyper-parameters. Where paper and released code differ we follow the code,
since the weights were tuned with it; the paper's readings are `cer_axis: feature`, `car_pool: all` and
`rotate: false`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from personalize_core.errors import InputError
from personalize_core.methods.recipe import NOTHING_INSIDE, Ablation, options
from personalize_core.methods.shared.options import ContextLosses, EmbeddingAndUNetRecipe, TokenRule

WINDOW = (0.4, 0.6)  # steps 121 to 180 of the published 300


@options
class Config(ContextLosses, EmbeddingAndUNetRecipe):
    """The embedding under context regularization, then the whole U-Net without it.

    Defaults are the paper's with the code's reading of them, for Stable Diffusion 2.1-base. A stage of 0 steps is left
    out, and the other stays as it is. Without context regularization both weights are 0.
    """

    display_name = "CoRe"
    learns = "one embedding; the U-Net"
    authors = "Wu et al."
    title = "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization"
    venue = "AAAI 2025"
    arxiv = "2408.15914"

    # A list of regularization prompts by its name, or "by_kind": "core_animate" or "core_inanimate", as the class
    # noun is. "training_prompt" is the ablation without a prompt set; "core_universal" is the authors' third list.
    prompt_set: str = "by_kind"
    # Whose embedding and attention are kept: the words around the concept, or, which the authors tried and rejected,
    # the concept's own word, kept like its class noun; over features, for one token has no cosine over tokens.
    regularized: Literal["context", "concept"] = "context"
    rescale: bool = True  # see CoRe.rescale in method.py
    # Shares of the first stage, so that it is rescaled at the same place whatever its length.
    rescale_after: Annotated[float, Field(ge=0, lt=1)] = WINDOW[0]
    rescale_until: Annotated[float, Field(gt=0, le=1)] = WINDOW[1]

    embedding_steps: Annotated[int, Field(ge=0)] = 300
    embedding_batch_size: Annotated[int, Field(gt=0)] = 6
    embedding_lr: Annotated[float, Field(gt=0)] = 5e-3

    unet_steps: Annotated[int, Field(ge=0)] = 1000
    unet_batch_size: Annotated[int, Field(gt=0)] = 4
    unet_lr: Annotated[float, Field(gt=0)] = 2e-6

    class_token_rule: TokenRule = "last"  # which token of the class noun the embedding starts from; the code: first
    rotate: bool = True  # concept images rotated and mirrored: in the code, not in the paper

    ablations = {
        "without_cer": Ablation({"cer_weight": 0.0}, "CoRe without CER"),
        "without_car": Ablation({"car_weight": 0.0}, "CoRe without CAR"),
        "constrained_concept": Ablation({"regularized": "concept"}, "CoRe with the concept token constrained"),
        # Before the method's own window, behind it, and all the time.
        "rescale_early": Ablation({"rescale_after": 0.0, "rescale_until": WINDOW[0]}, "CoRe rescaled early"),
        "rescale_late": Ablation({"rescale_after": WINDOW[1], "rescale_until": 1.0}, "CoRe rescaled late"),
        "rescale_throughout": Ablation({"rescale_after": 0.0, "rescale_until": 1.0}, "CoRe rescaled throughout"),
        "without_rescale": Ablation({"rescale": False, "rescale_after": WINDOW[0], "rescale_until": WINDOW[1]}),
        "without_prompt_set": Ablation({"prompt_set": "training_prompt"}),
        "without_stage_1": Ablation({"embedding_steps": 0}),
        "without_stage_2": Ablation({"unet_steps": 0}),
        # The paper's reading; the method itself is the code's. Likewise the next three.
        "cer_feature": Ablation({"cer_axis": "feature"}, "CoRe with CER over features"),
        "pooled_car": Ablation({"car_pool": "all"}, "CoRe with a pooled CAR"),
        "car_mean": Ablation({"car_batch": "mean"}, "CoRe with its CAR's batch mean"),
        "without_rotation": Ablation({"rotate": False}),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.embedding_steps or self.unet_steps):
            raise InputError(
                "embedding_steps and unet_steps are both 0, so nothing would be learned; give at least one stage "
                "some steps"
            )
        if self.prompt_set != "by_kind" and not (self.cer_weight or self.car_weight):
            raise InputError(
                f"prompt_set = {self.prompt_set!r} is for context regularization, which is off; take it out, or give "
                "cer_weight or car_weight a value above 0"
            )
        if self.regularized == "concept" and not (self.cer_weight or self.car_weight):
            raise InputError(
                "regularized = 'concept' says what context regularization keeps, which is off; take it out, or give "
                "cer_weight or car_weight a value above 0"
            )
        window = (self.rescale_after, self.rescale_until)
        if window[0] >= window[1]:
            raise InputError(
                f"the rescaling window begins after {window[0]} of the first stage and ends at {window[1]}, so it is "
                "empty; for no rescaling write `rescale: false`"
            )
        if window != WINDOW and not self.rescale:
            raise InputError(
                f"rescale_after = {window[0]} and rescale_until = {window[1]} set a window for rescaling, which is "
                "off; take them out, or write `rescale: true`"
            )

    @property
    def rescaled_steps(self) -> tuple[int, int]:
        """After how many steps of the first stage rescaling begins, and after how many it ends: one later at least."""
        first = min(round(self.rescale_after * self.embedding_steps), self.embedding_steps - 1)
        return first, max(round(self.rescale_until * self.embedding_steps), first + 1)

    @property
    def lacks(self) -> Mapping[str, str]:
        return super().lacks if self.unet_steps else NOTHING_INSIDE
