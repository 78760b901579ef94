"""One thing of the chain from a result down to the bytes behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Link:
    """One thing of the chain."""

    what: str  # "image", "grid", "artifact", ...
    path: str  # relative to the workspace, where it lies within
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # changed since, gone, stale
    making: dict[str, Any] = field(default_factory=dict)  # when, by which code and packages, on what
    again: str = ""  # the command that makes it again
    inputs: list[Link] = field(default_factory=list)

    def all_problems(self) -> list[str]:
        """Of the whole chain, each once."""
        own = [f"{self.what} {self.path}: {problem}" for problem in self.problems]
        return list(dict.fromkeys([*own, *(words for link in self.inputs for words in link.all_problems())]))
