"""How long a method is trained, where it is not for a fixed number of steps. Off in every published recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalize_core.errors import InputError
from personalize_core.methods.options import options

Stop = Literal["loss", "probes", "never"]
Keep = Literal["last", "best"]
Choice = Literal["balance", "identity", "text"]


@options
class Adaptive:
    """When a stage of training has learned enough, and which moment of the last one is kept.

    "loss" is DVAR (Voronov et al., "Is This Loss Informative?", NeurIPS 2023, arXiv:2302.04841): the training loss on
    inputs that stay the same has settled, when its variance over the latest `window` is less than `threshold` of its
    variance over all. A window is a share of the steps that a stage may take, so that it means the same in a training
    of 200 steps and in one of 3,000; DVAR counts steps. "probes": the latest `patience` probes were no better than the
    best before them, beyond what their images differ by. A stage's number of steps is then the most that it may take.
    """

    stop: Stop = "loss"
    window: Annotated[float, Field(gt=0, lt=1)] = 0.3  # of the steps that a stage may take
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.15  # DVAR's code
    patience: Annotated[int, Field(ge=1, le=9)] = 3  # probes; a stage has twelve at most
    keep: Keep = "last"
    by: Choice = "balance"  # of probes, for `stop: probes` and `keep: best`
    share: Annotated[float, Field(gt=0, le=0.5)] = 0.2  # of training's arithmetic that may be spent on watching it

    def __post_init__(self) -> None:
        if self.stop == "never" and self.keep == "last":
            raise InputError("stop: never and keep: last are how every method is trained; take `adaptive` out")

    @property
    def needs_probes(self) -> bool:
        return self.stop == "probes" or self.keep == "best"
