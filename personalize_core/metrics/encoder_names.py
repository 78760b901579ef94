"""Encoders and segmenters by name, and which weights a name stands for: read without loading one, or torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from personalize_core.files.stamps import sha256

MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "mini" / "weights"
MINI = {"mini-clip": "clip", "mini-identity": "identity", "mini-segmenter": "segmenter"}  # name -> folder of weights


class OnHub(NamedTuple):
    """Where published weights lie."""

    repository: str
    revision: str  # a commit, so that the weights cannot change under us


PUBLISHED = {
    "clip-b32": OnHub("timm/vit_base_patch32_clip_224.openai", "a6f597a30f7b82c51704746581f9a4e41421e878"),
    "clip-l14": OnHub("timm/vit_large_patch14_clip_224.openai", "18d0535469bb561bf468d76c1d73aa35156c922b"),
    "dino-s16": OnHub("facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd"),
    "dino-s16-stock": OnHub("facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd"),
    "clipseg": OnHub("CIDAS/clipseg-rd64-refined", "583b388deb98a04feb3e1f816dcdb8f3062ee205"),
}


def weights_of(name: str) -> str:
    """Identifies an encoder's weights: the hash of local files, the commit of published ones."""
    if name in PUBLISHED:
        return f"{name} {PUBLISHED[name].repository}@{PUBLISHED[name].revision}"
    folder = MINI_WEIGHTS / MINI[name] if name in MINI else Path(name.partition(":")[2] or name)
    weights = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return f"{name} {' '.join(sha256(path) for path in weights)}"
