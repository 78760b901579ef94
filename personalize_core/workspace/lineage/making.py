"""How a result came to be, beside what it was made from: when, by which code and libraries, on what.

That differs from run to run and from machine to machine, while a result is the same bytes every time. So it stands in
no result, but in a file of its own among the costs. A result that another machine made and DVC brought has none here.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import whole_folder, write_json

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

PACKAGES = (  # those whose arithmetic or files a result may depend on
    "accelerate", "diffusers", "matplotlib", "numpy", "open_clip_torch", "pillow", "polars", "pyarrow", "safetensors",
    "scipy", "torch", "torchvision", "transformers",
)  # fmt: skip
PACKAGE = Path(__file__).parents[2]


@contextmanager
def making(store: Store, folder: Path, stamp: str) -> Iterator[Path]:
    """As `whole_folder`, with a record of how the folder came to be.

    It is written before the folder appears: a process killed between the two then makes both again.
    """
    started = datetime.now(UTC)
    with whole_folder(folder, stamp) as new:
        yield new
        finished = datetime.now(UTC)
        times = {what: at.isoformat(timespec="seconds") for what, at in (("started", started), ("finished", finished))}
        seconds = round((finished - started).total_seconds(), 3)
        write_json(store.making(folder), {"stamp": stamp, **times, "seconds": seconds, "device": _device(), **here()})


@lru_cache(maxsize=1)
def here() -> dict[str, Any]:
    """The code, the libraries and the machine of this process."""
    return {
        "code": _commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Of this package's sources: the commit of git, and whether they differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # some other project's checkout, in which this package is installed
        return {"commit": git("rev-parse", "HEAD"), "changed_since": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _device() -> str | None:
    """What torch computes on in this process; None if nothing here has asked for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {torch.get_num_threads()} threads"
