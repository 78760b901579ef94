"""params.yaml, probes: how a training is watched."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.workspace.sections import Section


class ProbeSettings(Section):
    """A few images of the concept while it is learned, and the loss on inputs that stay the same."""

    share: Annotated[float, Field(ge=0, le=0.5)] = 0.05  # of training's arithmetic, at most; 0: not at all
    prompts: Annotated[int, Field(ge=1, le=100)] = 2  # the first of the concept's prompt list, an image each
    steps: Annotated[int, Field(ge=1, le=1000)] = 8  # of sampling
