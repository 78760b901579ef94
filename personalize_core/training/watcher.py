"""Who may watch a training, and end a stage of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from personalize_core.methods.interface import Stage


@dataclass(frozen=True)
class Watched:
    """What a watcher has to know to go on where a training resumes."""

    values: Mapping[str, Any] = field(default_factory=dict)  # as JSON has them
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Watcher(Protocol):
    """It is told of every step, and changes nothing of what a step computes. Steps are counted within their stage."""

    def begin(self, stages: Sequence[Stage], watched: Watched) -> None:
        """Before the first step, or before the first one after a training was cut off."""
        ...

    def pause(self, number: int, done: int) -> int:
        """Behind which step of stage `number`, of which `done` are done, to look next."""
        ...

    def look(self, number: int, done: int) -> None:
        """Behind a pause, and before the first step of a stage: the method is not attached."""
        ...

    def measure(self, number: int, done: int) -> Mapping[str, float]:
        """Before a stage's first step, and behind every step: the method is attached.

        Returns:
            what the log says of this step besides.
        """
        ...

    def has_learned(self, number: int) -> bool:
        """Whether stage `number` ends here."""
        ...

    def end(self, number: int, done: int) -> None:
        """Behind a stage's last step: the method is not attached, and may be changed."""
        ...

    def watched(self) -> Watched:
        """For a checkpoint."""
        ...


class Unwatched:
    """The watcher of those who let a training run to its end."""

    def begin(self, stages: Sequence[Stage], watched: Watched) -> None:
        self.steps = [stage.steps for stage in stages]

    def pause(self, number: int, done: int) -> int:
        return self.steps[number]

    def look(self, number: int, done: int) -> None:
        pass

    def measure(self, number: int, done: int) -> Mapping[str, float]:
        return {}

    def has_learned(self, number: int) -> bool:
        return False

    def end(self, number: int, done: int) -> None:
        pass

    def watched(self) -> Watched:
        return Watched()
