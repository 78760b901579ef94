"""Is there what torch.compile needs? Importing this module imports no torch."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from personalize_core.errors import InputError

_COMPILERS = {"darwin": "clang++", "win32": "cl"}


def check_compiler(device: str) -> None:
    """Raise InputError unless what compiles for a CPU or a graphics card is installed.

    device: "cpu" or "cuda".
    """
    advice = "or write `compile: false` in params.yaml"
    compiler = os.environ.get("CXX", _COMPILERS.get(sys.platform, "g++"))  # as torch chooses
    if not shutil.which(compiler):
        raise InputError(
            f"compile: true needs a C++ compiler, and there is no {compiler} here; install it (Debian and Ubuntu: "
            f"`apt install g++`), name another in the environment's CXX, {advice}"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise InputError(
            f"compile: true needs Python's header files, and there is no Python.h here; install them (Debian and "
            f"Ubuntu: `apt install python3-dev`), {advice}"
        )
    if device == "cuda" and not find_spec("triton"):
        raise InputError(
            f"compile: true needs the package triton on a graphics card, which is not installed; install it, {advice}"
        )
