"""Features of images that were encoded before a scoring was interrupted: the next one takes them from here.

They lie in a folder of their own until the table of scores is written, a file per chunk of images. A file's name says
all that its features depend on, so another image, encoder or mask rule never finds it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from personalize_core.files.atomic import save_tensors
from personalize_core.files.stamps import stamp_of

MARK = "personalize kept features 1"


@dataclass(frozen=True)
class Chunk:
    """What was computed of a few images."""

    features: Mapping[str, Tensor]  # name -> (N, D), of those that could be read
    shares: Sequence[float]  # (N) of each image that its mask leaves; empty without a segmenter
    left_out: Sequence[tuple[int, str]] = ()  # (place in the chunk, reason) of images that cannot be read


@dataclass(frozen=True)
class KeptFeatures:
    """A folder for one table; never versioned, and free to be deleted while nothing runs."""

    folder: Path

    def read(self, depends_on: Mapping[str, Any]) -> Chunk | None:
        """What was kept under these dependencies; None if there is nothing, or a damaged file."""
        try:
            with safe_open(self._path(depends_on), "pt") as opened:
                about = opened.metadata() or {}
                if about.get("mark") != MARK:
                    return None
                features = {name: opened.get_tensor(name) for name in opened.keys()}
            left_out = [(int(place), str(reason)) for place, reason in json.loads(about["left_out"])]
            return Chunk(features, json.loads(about["shares"]), left_out)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def write(self, depends_on: Mapping[str, Any], chunk: Chunk) -> None:
        """Atomically: whoever is killed leaves the whole file or none."""
        said = {"shares": list(chunk.shares), "left_out": list(chunk.left_out)}
        about = {"mark": MARK, **{key: json.dumps(value) for key, value in said.items()}}
        save_tensors(self._path(depends_on), chunk.features, about)

    def remove(self) -> None:
        """To be called when the table is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, depends_on: Mapping[str, Any]) -> Path:
        return self.folder / f"{stamp_of(depends_on)}.safetensors"
