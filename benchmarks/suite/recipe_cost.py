"""What a whole recipe takes: seconds and peak memory of every stage, at the published batch sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.suite.floor import flops_of
from benchmarks.suite.one_step import add_gradients_of_step
from benchmarks.suite.rows import SEED, random_latents
from benchmarks.suite.setting import Setting
from benchmarks.suite.timing import Deadline, now
from personalize_core.concepts.images import ConceptLatents
from personalize_core.training.checkpoints import LogRow
from personalize_core.training.loop import train
from personalize_core.training.run_costs import PeakMemory

FIRST, SECOND = 2, 4  # steps of each stage: to warm up, and to see how many fit into the time


@dataclass(frozen=True)
class StageCost:
    """One stage of a recipe."""

    name: str
    published_steps: int
    measured_steps: int
    seconds_per_step: float
    flops: float  # of one step
    floor: float  # seconds per step at the device's matrix rate


@dataclass(frozen=True)
class RecipeCost:
    """A training by a recipe, whole or as much of it as fitted into the time."""

    method: str
    size: str
    stages: list[StageCost]
    memory: dict[str, Any]  # `PeakMemory.costs`

    @property
    def whole(self) -> bool:
        return all(stage.measured_steps == stage.published_steps for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all published steps, at the seconds per step that were measured."""
        return sum(stage.published_steps * stage.seconds_per_step for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"whole": self.whole, "seconds": self.seconds}


def measure_recipe(setting: Setting, name: str, deadline: Deadline) -> RecipeCost:
    """Train by the recipe as it is, if that fits into the time, else as large a share of every stage as does."""
    images, published = random_latents(setting.models.base), setting.recipe(name)
    steps = steps_of(published)
    _seconds_of_stages(setting, name, dict.fromkeys(steps, FIRST), images)
    each = _seconds_of_stages(setting, name, dict.fromkeys(steps, SECOND), images)
    method = setting.method(name, published)
    stages = {stage.name: stage for stage in method.stages()}
    expected = sum(stage.steps * each[stage.name] / SECOND for stage in stages.values())
    share = min(1.0, deadline.left / expected)
    memory = PeakMemory(setting.models.base.device)
    wanted = {field: min(count, max(SECOND, round(share * count))) for field, count in steps.items()}
    taken = _seconds_of_stages(setting, name, wanted, images)
    measured = {stage.name: stage.steps for stage in setting.method(name, with_steps(published, wanted)).stages()}
    costs, found = memory.costs(), []
    for stage in stages.values():
        flops = float(flops_of(lambda stage=stage: add_gradients_of_step(method, setting.models.base, images, stage)))
        count = measured[stage.name]
        each_step = taken[stage.name] / count
        found.append(StageCost(stage.name, stage.steps, count, each_step, flops, flops / setting.models.rate))
    return RecipeCost(name, setting.models.size, found, costs)


def steps_of(recipe: Any) -> dict[str, int]:
    """Field of a recipe -> the steps that it says, without those that are 0."""
    names = [field.name for field in dataclasses.fields(recipe) if field.name.endswith("steps")]
    return {name: getattr(recipe, name) for name in names if getattr(recipe, name)}


def with_steps(recipe: Any, steps: dict[str, int]) -> Any:
    return dataclasses.replace(recipe, **steps)


def _seconds_of_stages(setting: Setting, name: str, steps: dict[str, int], images: ConceptLatents) -> dict[str, float]:
    """Train so many steps; seconds of each stage, from the last row of the one before to its own last row."""
    method, base = setting.method(name, with_steps(setting.recipe(name), steps)), setting.models.base
    ended: dict[str, float] = {}

    def log(row: LogRow) -> None:
        ended[row["stage"]] = now(setting.models.device)

    began = now(setting.models.device)
    train(method, base, images, SEED, log)
    moments = [began, *ended.values()]
    return {name: end - start for name, start, end in zip(ended, moments, moments[1:], strict=False)}
