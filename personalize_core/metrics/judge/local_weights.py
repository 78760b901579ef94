"""Which weights a local judge has: read without loading them, or torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.files.outside import is_folder, refuse_pickles_in
from personalize_core.files.stamps import sha256


def weights_of(model: str, revision: str | None) -> str:
    """Identifies the weights: the hash of local files, the commit of those on the hub.

    Raises:
        InputError: `model` is no folder with weights, and no OWNER/NAME with a revision.
    """
    if not is_folder(Path(model)):
        if revision is None or model.count("/") != 1:
            raise InputError(
                f"judge.local.model {model!r} is no folder; write the path of one, or OWNER/NAME of a model on the "
                "Hugging Face Hub and its commit as judge.local.revision"
            )
        return f"{model}@{revision}"
    return _hash_of(files_in(Path(model)))


def files_in(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        InputError: there is none.
    """
    if found := sorted(folder.glob("*.safetensors")):
        return found
    refuse_pickles_in(folder)
    raise InputError(f"{folder} holds no safetensors file; save the model there with transformers' save_pretrained")


def _hash_of(paths: Sequence[Path]) -> str:
    """The sha256 of the file, or of all files' hashes in their order."""
    hashes = [sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
