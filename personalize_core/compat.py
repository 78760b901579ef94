"""Workarounds for libraries.

torchvision's wheel carries operators compiled for the CUDA build of torch. Beside the CPU build they
do not load, and `import torchvision`, hence diffusers, transformers and open_clip, fail while
registering the meta kernels of `torchvision::nms` and `torchvision::qnms`. Declaring the two schemas
beforehand is enough: nothing here ever calls the operators.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def define_missing_torchvision_operators() -> None:
    """Arrange for the schemas to exist before torchvision is first imported, without importing torch now."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def hide_bars_of_transformers() -> None:
    """Keep transformers from printing a progress bar for weights that it reads from disk in a moment.

    It would be printed into the bars of our own. Downloads have bars of another library, and keep them.
    """
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))


class _BeforeTorchvision:
    """An import finder that acts once, when torchvision is first asked for, and finds nothing itself."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _define_schemas()
        return None


_libraries = []  # a torch.library.Library takes its schemas with it when it is collected


def _define_schemas() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            try:
                torch.ops.load_library(f"{folder}/_C{suffix}")
            except OSError:
                continue
            return  # the compiled operators load: nothing is missing
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in OPERATORS.items():
        library.define(name + schema)
    _libraries.append(library)
