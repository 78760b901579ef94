"""What an artifact says of itself in config.json, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, read_json, read_record

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
_NEEDED = {"format": int, "method": str, "concept": dict, "config": dict, "base_model": dict}  # of the description
_OF_CONCEPT, _OF_BASE = ("name", "placeholder", "class_noun"), ("name", "weights_hash")


def check(folder: Path, method: str | None, base_model: str, weights_hash: str) -> dict[str, Any]:
    """What the artifact's description says.

    Raises:
        InputError: there is no artifact, its description is damaged, or it is of another base model or method.
    """
    saved = _described(folder)
    trained_on = saved["base_model"]
    if saved["format"] != FORMAT:
        raise InputError(
            f"{folder} was written in format {saved['format']}, this version reads {FORMAT}; train it again"
        )
    if method is not None and saved["method"] != method:
        raise InputError(
            f"{folder} holds what {saved['method']} has learned, not {method}; put it where {saved['method']}'s "
            f"artifacts lie, or remove it and train {method}"
        )
    if trained_on["weights_hash"] != weights_hash:
        again = "remove it and import again" if saved.get("imported") else "train again"
        raise InputError(
            f"{folder} was trained on the base model {trained_on['name']!r} ({trained_on['weights_hash']}), not on "
            f"{base_model!r} ({weights_hash}); load that one, or {again}"
        )
    return saved


def _described(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no artifact; train it first, with `personalize train`")
    try:
        saved = read_json(folder / CONFIG)
    except ValueError:
        raise damaged(folder) from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in _NEEDED.items()):
        raise damaged(folder)
    named = [*(saved["concept"].get(key) for key in _OF_CONCEPT), *(saved["base_model"].get(key) for key in _OF_BASE)]
    if not all(isinstance(name, str) for name in named):
        raise damaged(folder)
    return saved


def damaged(folder: Path) -> InputError:
    again = "import" if imported(folder) else "train"
    return InputError(f"{folder} holds a damaged artifact; remove the folder and {again} again")


def imported(folder: Path) -> str | None:
    """The name of the file or folder that was imported; None where the artifact was trained here, or there is none.

    Its manifest says so too: what no training can bring back is not taken for trained where its description is damaged.
    """
    if described := read_record(folder / CONFIG):
        name = described.get("imported")
        return name if isinstance(name, str) else None
    made_from = read_record(folder / MANIFEST).get("made_from")
    files = made_from.get("imported") if isinstance(made_from, dict) else None
    return Path(next(iter(files))).parts[0] if isinstance(files, dict) and files else None
