"""Forward and backward of one training step of ours, as `training.loop` takes it, without the optimizer."""

from __future__ import annotations

from benchmarks.suite.rows import SEED
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method, Stage
from personalize_core.training.loop import add_gradients, noisy_rows


def add_gradients_of_step(method: Method, base: BaseModel, images: ConceptLatents, stage: Stage) -> float:
    """Leave the gradients of a stage's first step in what the stage trains; returns its loss."""
    begin(method, base, stage)
    rows = noisy_rows(method, base, images, stage, SEED, 0)
    with (stage.attach or method.attach)(base):
        losses = add_gradients(stage, method, base, rows, [slice(0, len(rows.t))])
    return sum(loss.item() for loss in losses.values())


def begin(method: Method, base: BaseModel, stage: Stage) -> None:
    """Let gradients reach what a stage trains, and nothing else."""
    method.train().to(base.device)
    method.requires_grad_(False)
    for group in stage.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
