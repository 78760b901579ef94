"""Encoders to score with: the miniature's, or random weights in the shapes of published ones, which need no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from benchmarks.suite.models import Size
from personalize_core.metrics.encoder_names import MINI_WEIGHTS
from personalize_core.metrics.encoders import no_warnings_logged


class EncoderFolders(NamedTuple):
    """One for CLIP-T and CLIP-I, as open_clip wrote it; one for DINO, as transformers did."""

    clip: Path
    identity: Path


def encoder_folders(size: Size, into: Path) -> EncoderFolders:
    """The miniature's own; else random weights, written to `into`: ViT-B/32 and ViT-S/16, or tiny ones."""
    if size == "mini":
        return EncoderFolders(MINI_WEIGHTS / "clip", MINI_WEIGHTS / "identity")
    folders = EncoderFolders(into / "clip", into / "identity")
    with torch.random.fork_rng(devices=[]), no_warnings_logged():
        torch.manual_seed(0)
        _write_clip(folders.clip, size == "tiny")
        _write_identity(folders.identity, size == "tiny")
    return folders


def _write_clip(folder: Path, tiny: bool) -> None:
    found: Any = open_clip.get_model_config("ViT-B-32-quickgelu")
    config: dict[str, Any] = {**found}
    if tiny:
        config["embed_dim"] = 8
        config["vision_cfg"] = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
        config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


def _write_identity(folder: Path, tiny: bool) -> None:
    shape = (16, 1, 2, 32, 16, 8) if tiny else (384, 12, 6, 1536, 224, 16)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    ViTModel(ViTConfig(**dict(zip(names, shape, strict=True))), add_pooling_layer=False).save_pretrained(folder)
    side = shape[4]
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
