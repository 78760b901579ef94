"""A training, watched at a stated cost: the loss on inputs that stay the same, and a few images at times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.methods.adaptive import Adaptive
from personalize_core.methods.interface import Method, Stage
from personalize_core.randomness import generator_for
from personalize_core.training.fixed_inputs import ROWS, losses_on_fixed_inputs
from personalize_core.training.stopping import best_of, gains_no_more, has_settled, losses_in_window
from personalize_core.training.watcher import Watched

STEP = 3  # a step costs about three passes of its rows through the U-Net: forward, and twice as much backward
DECODED = 4  # to decode an image and to compute its features costs about as many passes of one row as this
LEAST = 2  # probes: with fewer nothing can be seen to change
MOST = 12  # of a stage: more are hard to look at
Heard = Callable[[float, Mapping[str, Sequence[float]]], None]
"""Hears of a probe: how much of the training was done by then, of 1, and the metrics of its images, as `Probed`.

What it raises ends the training.
"""
LOSS = 0.25  # of what may be spent on watching; the rest goes to probes, unless the loss alone decides


@dataclass(frozen=True)
class Probed:
    """What a probe saw: of each of its N images."""

    images: Tensor  # (N, H, W, 3) uint8
    metrics: Mapping[str, Sequence[float]]  # of the images of the concept; among them those that `Adaptive.by` names


@dataclass(frozen=True)
class Probes:
    """How a probe is made, and what it costs."""

    look: Callable[[Method], Probed]  # the method is not attached, and is left in evaluation mode
    images: int
    sampling_steps: int

    @property
    def passes(self) -> int:
        """Of one row through the U-Net, by how much work it is; both halves of guidance count."""
        return self.images * (2 * self.sampling_steps + DECODED)


@dataclass(frozen=True)
class Plan:
    """When a training is looked at."""

    every: Sequence[int]  # stage -> behind every so many steps the loss
    probes: Sequence[Sequence[int]]  # stage -> behind which steps a probe

    @classmethod
    def of(cls, stages: Sequence[tuple[int, int, int]], passes: int, loss: float, probes: float) -> Plan:
        """As often as may be.

        Each stage has as many probes as another, but for one; they lie evenly in it. The first is before training
        begins, the last at its end.

        Args:
            stages: (steps, rows of a step, rows on which the loss is taken) of each.
            passes: what a probe costs; 0: there are none.
            loss, probes: which share of the training's arithmetic may go to each.
        """
        every = [
            max(1, math.ceil(fixed / (loss * STEP * rows))) if loss else steps + 1 for steps, rows, fixed in stages
        ]
        arithmetic = sum(STEP * steps * rows for steps, rows, _ in stages)
        trained = [number for number, (steps, _, _) in enumerate(stages) if steps]
        count = min(math.floor(probes * arithmetic / passes), MOST * len(trained)) if passes else 0
        behind: list[set[int]] = [set() for _ in stages]
        for n in range(count if count >= LEAST else 0):
            # on a line on which each stage is as long as another
            place, within = divmod(n * len(trained), count - 1)
            # a moment between two stages is the later one's first, so that nothing is looked at twice
            number = trained[min(place, len(trained) - 1)]
            steps, is_end = stages[number][0], n == count - 1
            at = steps if is_end else round(steps * within / (count - 1))
            behind[number].add(at if is_end or number == trained[-1] else min(at, steps - 1))
        return cls(every, [sorted(moments) for moments in behind])


class Watch:
    """Watches a training as a `Watcher`.

    Every look depends on the method as it is then and on (seed, stage) alone, and happens behind steps that are known
    beforehand. So a training that was cut off sees, decides and keeps what an undisturbed one does.
    """

    def __init__(
        self,
        method: Method,
        base: BaseModel,
        images: ConceptLatents,
        seed: int,
        probes: Probes | None,
        share: float,
        adaptive: Adaptive | None = None,
        heard: Heard | None = None,
    ) -> None:
        """
        Args:
            probes: None: only the loss is watched.
            share: of the training's arithmetic that may be spent. That of `adaptive` goes before.
            heard: where a training goes on, it hears of earlier probes once more.
        """
        self.method, self.base, self.images, self.seed = method, base, images, seed
        self.probes, self.adaptive, self.heard = probes, adaptive, heard
        self.share = adaptive.share if adaptive else share
        self.losses: list[dict[str, Any]] = []  # "stage", "step", "values" of each row
        self.seen: list[dict[str, Any]] = []  # "stage", "step", "metrics" of each image, as `Probed`
        self.pictures: list[Tensor] = []  # of each of `seen`
        self.ended: dict[str, dict[str, Any]] = {}  # stage -> its number of steps, and why no more
        self.kept: dict[str, Tensor] = {}  # the best moment of the last stage
        self.best = -1  # which of `seen` that is
        self.done = 0  # steps of the stage under way

    # As a Watcher

    def begin(self, stages: Sequence[Stage], watched: Watched) -> None:
        """Raises InputError where `share` is too small for what `adaptive` decides by."""
        self.stages = stages
        described = [(stage.steps, self._rows(stage), self._rows(stage, ROWS)) for stage in stages]
        loss = 1 - LOSS if self.adaptive and not self.adaptive.needs_probes else LOSS
        passes = self.probes.passes if self.probes else 0
        self.plan = Plan.of(described, passes, loss * self.share, (1 - loss) * self.share)
        self._check(described)
        values = watched.values
        self.losses, self.seen = list(values.get("losses", [])), list(values.get("seen", []))
        self.ended, self.best = dict(values.get("ended", {})), values.get("best", -1)
        self.pictures = [watched.tensors[f"pictures.{n}"] for n in range(len(self.seen))]
        self.kept = _under("kept.", watched.tensors)
        for one in self.seen:
            self._tell(one)

    def pause(self, number: int, done: int) -> int:
        later = [step for step in self.plan.probes[number] if step > done]
        return min([*later, self.stages[number].steps])

    def look(self, number: int, done: int) -> None:
        self.done = done
        if done in self.plan.probes[number]:
            self._probe(number, done)

    def measure(self, number: int, done: int) -> Mapping[str, float]:
        self.done = done
        if done % self.plan.every[number] and done != self.stages[number].steps:
            return {}
        stage = self.stages[number]
        values = losses_on_fixed_inputs(self.method, self.base, self.images, stage, self.seed).tolist()
        self.losses.append({"stage": stage.name, "step": done, "values": values})
        return {"fixed_inputs": sum(values)}

    def has_learned(self, number: int) -> bool:
        how, name = self.adaptive, self.stages[number].name
        if self.done < self.stages[number].least_steps:
            return False
        if how and how.stop == "loss":
            losses = [sum(one["values"]) for one in self.losses if one["stage"] == name]
            return has_settled(losses, self._window(number), how.threshold)
        if how and how.stop == "probes":
            scores = self._scores(self._of(name))
            # where no probe is above the first of all, nothing has been learned yet, and there is more to wait for
            gained = scores and max(each.mean() for each in scores) > self._scores([0])[0].mean()
            return bool(gained) and gains_no_more(scores, how.patience)
        return False

    def end(self, number: int, done: int) -> None:
        stage, last = self.stages[number], number == len(self.stages) - 1
        if last and self.plan_has_probes and not self._has(stage.name, done):
            self._probe(number, done)  # so that what was learned is seen, wherever it ended
        learned = done < stage.steps
        self.ended[stage.name] = {"steps": done, "of": stage.steps, "learned": learned, "kept": done}
        if last and self.kept:
            self.ended[stage.name]["kept"] = self.seen[self.best]["step"]
            self.method.load_state_dict(self.kept)

    def watched(self) -> Watched:
        values = {"losses": [*self.losses], "seen": [*self.seen], "ended": {**self.ended}, "best": self.best}
        tensors = {f"pictures.{n}": images for n, images in enumerate(self.pictures)}
        return Watched(values, tensors | {f"kept.{name}": tensor for name, tensor in self.kept.items()})

    # Inside

    @property
    def plan_has_probes(self) -> bool:
        return any(self.plan.probes)

    def _probe(self, number: int, done: int) -> None:
        assert self.probes
        stage = self.stages[number]
        if self._has(stage.name, done):  # it was taken before the training was cut off
            return
        probed = self.probes.look(self.method)
        self.method.train()
        self.seen.append(
            {"stage": stage.name, "step": done, "metrics": {k: list(v) for k, v in probed.metrics.items()}}
        )
        self.pictures.append(probed.images)
        how = self.adaptive
        trained = any(earlier.steps for earlier in self.stages[:number])
        if how and how.keep == "best" and number == len(self.stages) - 1 and (trained or done):
            # before anything is trained nothing can be kept: an image that only follows its prompt may score well
            of_stage = [place for place in self._of(stage.name) if trained or self.seen[place]["step"]]
            place = of_stage[best_of(self._scores(of_stage))]
            if place == len(self.seen) - 1:
                self.best = place
                self.kept = {name: t.detach().cpu().clone() for name, t in self.method.state_dict().items()}
        self._tell(self.seen[-1])

    def _tell(self, one: Mapping[str, Any]) -> None:
        if self.heard is not None:
            names = [stage.name for stage in self.stages]
            done = sum(stage.steps for stage in self.stages[: names.index(one["stage"])]) + one["step"]
            self.heard(done / sum(stage.steps for stage in self.stages), one["metrics"])

    def _has(self, stage: str, step: int) -> bool:
        return any((one["stage"], one["step"]) == (stage, step) for one in self.seen)

    def _of(self, stage: str) -> list[int]:
        return [place for place, one in enumerate(self.seen) if one["stage"] == stage]

    def _scores(self, places: Iterable[int]) -> list[np.ndarray]:
        assert self.adaptive
        return [np.array(self.seen[place]["metrics"][self.adaptive.by], dtype=float) for place in places]

    def _window(self, number: int) -> int:
        """How many values of the loss the rule looks at."""
        assert self.adaptive
        return losses_in_window(self.adaptive.window, self.stages[number].steps, self.plan.every[number])

    def _rows(self, stage: Stage, size: int | None = None) -> int:
        generator = generator_for(self.seed, stage.name, "size")
        return len(self.method.batch(self.images, size or stage.batch_size, generator).prompts)

    def _check(self, described: Sequence[tuple[int, int, int]]) -> None:
        how = self.adaptive
        if not how or not described:  # nothing is trained
            return
        name = self.stages[-1].name
        values, window = described[-1][0] // self.plan.every[-1], self._window(len(described) - 1)
        if how.stop == "loss" and values <= window:
            raise InputError(
                f"adaptive: share: {how.share} allows {values} values of the loss in stage {name!r}, and window: "
                f"{how.window:g} needs more than {window}; raise share, or train for more steps"
            )
        least = how.patience + 2 if how.stop == "probes" else LEAST
        if how.needs_probes and (count := len(self.plan.probes[-1])) < least:
            raise InputError(
                f"adaptive: share: {how.share} allows {count} probes in stage {name!r}, and it takes {least} at least "
                "to stop or choose by them; raise share, take fewer prompts or sampling steps in probes, lower "
                "patience, or train for more steps"
            )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
