"""The device guard of CUDA for a CPU build of torch: compiled once, and loaded before torch.

torch looks up its hooks of CUDA once, so this module must be imported before torch. It imports nothing of the project,
and `make test-card` names it as a plugin of pytest, which imports plugins before any conftest.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
CACHE = Path(__file__).parents[2] / "build" / "pretended_card"


def _load() -> str:
    """Compile and load the guard. Returns why that is not possible here, or nothing.

    Raises:
        RuntimeError: the compiler refuses the source.
    """
    if "torch" in sys.modules:
        return "torch was imported before the guard of the pretended card; run these tests with `make test-card`"
    spec = find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    if list((torch / "lib").glob("*torch_cuda*")):
        return "this torch is built with CUDA, whose own device guard cannot be replaced by that of a pretended card"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "there is no C++ compiler (g++, or what CXX names) to build the guard of the pretended card"
    # The kernels are torch's own, so what was built for another release must not be loaded.
    name = sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = CACHE / f"guard-{name}.so"
    if not library.exists():
        _compile(compiler, torch, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return ""


def _compile(compiler: str, torch: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    include = torch / "include"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder, library.name)
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(new)]
        command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot compile {SOURCE}:\n{done.stderr}")
        os.replace(new, library)


WHY_NOT = _load()  # empty, or why there is no pretended card in this process
