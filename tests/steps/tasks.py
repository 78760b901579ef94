"""Tasks for other processes, which import this module and so start without torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.steps.events import Event, Listener
from personalize_core.workspace.store import OWN_DEVICE


def told(number: int, folder: Path, listener: Listener) -> int:
    """Ends when its neighbour has begun, so that it ends only beside another."""
    with (folder / str(number // 2)).open("w" if number % 2 else "r"):  # a named pipe opens when both ends are opened
        pass
    listener(Event(f"task {number}", number, 4, {"process": float(os.getpid())}))
    return number * 10 + int(os.environ[OWN_DEVICE])


def wrong(listener: Listener) -> None:
    raise InputError("the third is wrong")


def ended(listener: Listener) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def marked(path: Path, listener: Listener) -> None:
    path.touch()


def held(path: Path, go: Path, listener: Listener) -> None:
    """Ends when it may: a named pipe opens for reading as soon as somebody may write."""
    path.touch()
    go.open().close()


def forever(listener: Listener) -> None:
    listener(Event("it works", 0, 1))
    signal.pause()
