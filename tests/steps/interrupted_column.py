"""A process that scores an external column, tells of its progress, and waits to be killed in the middle."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from personalize_core import steps
from personalize_core.steps.events import Event
from personalize_core.workspace.store import Store

STOP_AT = 64  # images


def main(root: Path, concept: str, label: str) -> None:
    def told(event: Event) -> None:
        if event.what.startswith("scoring"):
            print(event.done, flush=True)
            if event.done >= STOP_AT:
                threading.Event().wait()  # until this process is killed

    steps.score_external(Store(root), concept, label, told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
