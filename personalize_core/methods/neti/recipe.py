"""NeTI's recipe.

We follow the authors' code (NeuralTextualInversion/NeTI); where it decides something that the paper's description
leaves open, that is said below and in method.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError
from personalize_core.methods.recipe import Ablation, Recipe, options, refuse_idle
from personalize_core.methods.shared.options import MinTimestep, TokenRule


@options
class Sampling:
    """How a trained artifact is used."""

    # Of the mapper's 128. Fewer are easier to edit, all keep most identity.
    truncation: Annotated[
        Annotated[int, Field(ge=0, le=128)] | None, Field(description="silences the mapper's units from this one on")
    ] = None


@options
class Config(Recipe):
    """A small network in the placeholder's place: another word for every timestep and cross-attention layer.

    Defaults are the code's, for Stable Diffusion 1.4; the first four options are its own ablations.
    """

    display_name = "NeTI"
    learns = "a small network in the placeholder's place"
    authors = "Alaluf et al."
    title = "A Neural Space-Time Representation for Text-to-Image Personalization"
    venue = "SIGGRAPH Asia 2023"
    arxiv = "2305.15391"
    Sampling = Sampling

    nested_dropout: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability per layer; 0 turns it off
    positional_encoding: bool = True  # Fourier features; else t and l themselves, each scaled to [-1, 1]
    bypass: bool = True  # does the mapper add to the text encoder's output too?
    # To the norm of the class noun's embedding: the code scales the mapper's output as one vector, so that with a
    # bypass the embedding alone is shorter; "per_half" scales embedding and bypass each.
    rescale: Literal["joint", "per_half", "none"] = "joint"
    sigma_t: Annotated[float, Field(gt=0)] = 0.03
    sigma_l: Annotated[float, Field(gt=0)] = 2.0
    time_anchors: Annotated[int, Field(gt=0, le=1000)] = 10
    class_token_rule: TokenRule = "last"  # whose norm is meant, where the class noun has several tokens
    templates: str = "ti_object_27"  # training prompts; the concept alone stands in their slot
    steps: Annotated[int, Field(gt=0)] = 1000
    batch_size: Annotated[int, Field(gt=0)] = 8  # the code's 2, accumulated 4 times
    dropout_rows: Annotated[int, Field(gt=0)] = 2  # batch items that share nested dropout's choice: the code's batch
    lr: Annotated[float, Field(gt=0)] = 8e-3  # 1e-3, scaled by batch and accumulation
    min_timestep: MinTimestep = 0

    ablations = {  # the options of its code
        "without_nested_dropout": Ablation({"nested_dropout": 0.0}),
        "without_positional_encoding": Ablation({"positional_encoding": False}),
        "without_bypass": Ablation({"bypass": False}),
        "without_rescaling": Ablation({"rescale": "none"}),
        "rescaling_per_half": Ablation({"rescale": "per_half"}, "NeTI with rescaling per half"),  # as it is described
    }

    def __post_init__(self) -> None:
        if self.rescale == "per_half" and not self.bypass:
            raise ValueError("rescale = 'per_half' needs the bypass: without it there is one half; write 'joint'")
        if not self.nested_dropout:
            refuse_idle(self, "dropout_rows", off="nested_dropout: 0")
        if not self.positional_encoding:
            refuse_idle(self, "sigma_t", "sigma_l", "time_anchors", off="positional_encoding: false")
        if self.rescale == "none":
            refuse_idle(self, "class_token_rule", off="rescale: none")

    def check(self, sampling: Sampling) -> None:
        """Truncation needs the order that nested dropout gives the units; without it the code ignores truncation."""
        if sampling.truncation is not None and not self.nested_dropout:
            raise InputError(
                f"truncation = {sampling.truncation} does nothing with nested_dropout: 0, which leaves the mapper's "
                "units without an order; take it out"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("squash", "bicubic", flip=True)

    @property
    def samples_as_it_trains(self) -> bool:
        return self.nested_dropout == 0
