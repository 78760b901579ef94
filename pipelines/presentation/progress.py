"""A step's progress in Dagster's log: the first word, the last, and one every few seconds between."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from personalize_core.steps import Event, Listener

EVERY_SECONDS = 10.0


def logged(context: dg.AssetExecutionContext | dg.OpExecutionContext) -> Listener:
    """A listener that writes into the run's log, with the time that is left."""
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def listen(event: Event) -> None:
        now = time.monotonic()
        begun = started.setdefault(event.what, now)
        if event.done < event.total and now - spoken.get(event.what, float("-inf")) < EVERY_SECONDS:
            return
        spoken[event.what] = now
        metrics = "".join(f", {name} {value:.3g}" for name, value in event.metrics.items())
        left = (now - begun) / event.done * (event.total - event.done) if event.done else 0.0
        remaining = f", about {left:.0f} s left" if left >= 1 else ""
        context.log.info(f"{event.what}: {event.done} of {event.total}{metrics}{remaining}")

    return listen
