"""A lock that the process of a run holds until it ends: whoever can take the lock knows that the process is gone.

The operating system gives the lock back however the process ended, a power cut included, and it holds between machines
that share the workspace (docs/running_as_a_team.md, Many machines).
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".lock"
_held: dict[str, int] = {}  # the run that this process works on, and the file that says so


def hold(folder: Path, run_id: str) -> None:
    """Say that this process works on a run, until it ends or works on another one."""
    if run_id in _held:
        return
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{run_id}.{os.getpid()}.tmp"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)  # no other program inherits it
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    os.rename(new, folder / f"{run_id}{SUFFIX}")  # locked before anyone can find it
    _held[run_id] = descriptor


def without_process(folder: Path) -> Iterator[tuple[str, Path]]:
    """The runs whose process is gone, each with its file, which says which process that was."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if _is_free(path):
            yield path.name.removesuffix(SUFFIX), path


def _is_free(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
