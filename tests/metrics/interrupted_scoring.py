"""A process that encodes the images of a folder, tells of every chunk, and waits to be killed in the middle."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from personalize_core.metrics.features import Processing, Seen
from personalize_core.metrics.kept_features import KeptFeatures
from tests.metrics.counting_encoder import ENCODERS

STOP_AT = 64  # images


def main(folder: Path) -> None:
    def told(done: int, total: int) -> None:
        print(done, flush=True)
        if done >= STOP_AT:
            threading.Event().wait()  # until this process is killed

    Seen.of(
        sorted(folder.glob("*.png")),
        "dog",
        None,
        ENCODERS,
        Processing(1, kept=KeptFeatures(folder / "k"), progress=told),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
