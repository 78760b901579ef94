"""Every method learns and samples the same with compiled transformer blocks, and leaves nothing of itself in them.

No test here knows a method's name. Nothing is rounded otherwise here, as what was traced is run as it is: what differs
would be a fault in what was traced, or in when it is traced again.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods import METHOD_NAMES
from personalize_core.methods.interface import Method
from personalize_core.training.loop import train
from personalize_core.training.watcher import Unwatched
from tests.conftest import equal_bits, sample_latents, snapshot
from tests.every_method.cases import CONCEPT, TRAINED, Case, kinds_of, samplings_of

BACKEND: Any = "eager"
CASES = [Case(name, kind) for name in METHOD_NAMES for kind in kinds_of(name) if kind != "linear"]


class Sampling(Unwatched):
    """Samples behind every step, where nothing is attached: what was attached then comes back."""

    def __init__(self, method: Method, base: BaseModel) -> None:
        self.method, self.base = method, base
        self.seen: list[Tensor] = []

    def pause(self, number: int, done: int) -> int:
        return min(done + 1, self.steps[number])

    def look(self, number: int, done: int) -> None:
        self.seen.append(sample_latents(self.method.eval(), self.base, [self.method.say("a photo of a {}")], steps=1))
        self.method.train()


def learned(case: Case, base: BaseModel, images) -> tuple[Method, list[Any], list[Tensor]]:
    """The method, its log, and what was sampled meanwhile and in the end, in each way of sampling."""
    method = case.make(base, CONCEPT)
    watcher = Sampling(method, base)
    rows = train(method, base, images, 0, watcher=watcher) if case.name in TRAINED else []
    method.eval().requires_grad_(False)
    for options in samplings_of(case.name):
        method.sampling = method.config.Sampling(**options)
        watcher.seen.append(sample_latents(method, base, [method.say("a photo of a {}"), "a dog"], steps=1))
    return method, rows, watcher.seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_blocks_learn_and_sample_the_same_bits(case, images):
    expected, log, seen = learned(case, case.base(), images)
    base = case.base()
    base.compiles, before = True, snapshot(base)
    with base.compiled(BACKEND):
        method, compiled_log, compiled_seen = learned(case, base, images)
    assert base._compiled and not base._compiled.gave_up
    assert compiled_log == log
    assert all(map(torch.equal, compiled_seen, seen)) and len(compiled_seen) == len(seen)
    assert equal_bits(dict(method.state_dict()), dict(expected.state_dict()))
    assert equal_bits(snapshot(base), before)
    gone = weakref.ref(method)
    del method
    gc.collect()
    assert gone() is None  # what is compiled is kept, and keeps nothing of whom it was compiled for
