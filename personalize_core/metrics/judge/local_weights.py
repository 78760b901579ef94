"""Which weights a local judge has: read without loading them, or torch."""

from __future__ import annotations

from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.files.outside import is_folder, refuse_pickles_in
from personalize_core.files.stamps import folder_hash

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # what a model and its processor are read from


def weights_of(model: str, revision: str | None) -> str:
    """Identifies the model: the hash of its local files, processor and template among them; the commit on the hub.

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
    folder = Path(model)
    if not any(folder.glob("*.safetensors")):
        refuse_pickles_in(folder)
        raise InputError(f"{folder} holds no safetensors file; save the model there with transformers' save_pretrained")
    return folder_hash(folder, FILES)
