"""A whole workspace in a temporary folder: a tiny random base model, tiny random encoders, two synthetic concepts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from personalize_core import steps
from personalize_core.concepts import concept_files
from personalize_core.workspace.store import Store
from tests.conftest import stock_pipeline, tiny_parts, tiny_xl_parts

PROMPTS = ["a photo of a {}", "a photo of a {} on the beach"]


def make(root: Path) -> Store:
    """A workspace whose every step takes a fraction of a second."""
    for name, content in model_files().items():
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "data" / "prompts").mkdir(parents=True)
    (root / "data" / "prompts" / "two.txt").write_text("\n".join(PROMPTS) + "\n")
    write_params(root, params(root))
    for index, (name, class_noun) in enumerate([("rex", "dog"), ("cup", "red mug")]):
        paint_concept_images(root / "photos" / name, count=3, seed=index)
        concept_files.add_concept(root / "data" / "concepts", root / "photos" / name, class_noun)
    return Store(root)


def make_xl(root: Path) -> Store:
    """The same with a tiny Stable Diffusion XL. Images of 24 pixels: the base model's own are of 16."""
    make(root)
    stock_pipeline(tiny_xl_parts()).save_pretrained(root / "models" / "xl")
    base, short = str(root / "models" / "xl"), {"steps": 2, "batch_size": 2}
    values = params(root) | {
        "base_model": base,
        "image_size": 24,
        "methods": {
            "base_model": {},
            "textual_inversion": {base: short},
            "personalized_residuals": {base: {**short, "rank_fraction": 0.25}},
        },
    }
    write_params(root, values)
    return Store(root)


@cache
def model_files() -> dict[str, bytes]:
    """The base model and the encoders, which are the same for all workspaces: their files by path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock_pipeline(tiny_parts()).save_pretrained(folder / "base")
        tiny_encoders(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def params(root: Path) -> dict:
    """params.yaml, small."""
    base = str(root / "models" / "base")
    short = {"steps": 3, "batch_size": 2}
    return {
        "base_model": base,
        "seed": 5,
        "sampling": {"sampler": "ddim", "steps": 2, "guidance": 3.0, "images_per_prompt": 2, "prompts": "two"},
        "class_images": {"sampler": "ddim", "steps": 2, "guidance": 3.0},
        "encoders": {"text_image": [str(root / "models" / "clip")], "identity": [str(root / "models" / "identity")]},
        "methods": {
            "base_model": {},
            "textual_inversion": {base: short},
            "dreambooth": {base: {**short, "lr": 1e-3, "class_images": 2}},
            "personalized_residuals": {base: {**short, "rank_fraction": 0.25}},
        },
        "variants": {
            "personalized_residuals": {
                "personalized_residuals": {},
                "personalized_residuals_lag": {"lag": True},
            }
        },
    }


def params_of(root: Path, methods: Sequence[str]) -> dict:
    """The same, of these methods alone, each with the one variant of its own name."""
    values = params(root)
    return values | {"methods": {name: values["methods"][name] for name in methods}, "variants": {}}


def finished(root: Path, concepts: Sequence[str], methods: Sequence[str]) -> Store:
    """A workspace of these concepts and methods alone, in which each is trained, sampled and scored."""
    store = make(root)
    for name in set(store.concept_names()) - set(concepts):
        shutil.rmtree(store.concept_folder(name))
    store = write_params(root, params_of(root, methods))
    for concept in concepts:
        for method in methods:
            for step in (steps.train, steps.sample_grid, steps.score):
                step(store, concept, method)
        steps.score_references(store, concept)
    return store


def copy_of(root: Path, to: Path) -> Store:
    """The same workspace, for a test to change; its models stay where they are."""
    shutil.copytree(root / "data", to / "data")
    shutil.copy(root / "params.yaml", to / "params.yaml")
    return Store(to)


def write_params(root: Path, values: dict) -> Store:
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    return Store(root)


def paint_concept_images(folder: Path, count: int, seed: int) -> None:
    """Images of soft colours, larger than the model's and not square."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


def tiny_encoders(models: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vision: dict[str, Any] = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
        text: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        clip = open_clip.CLIP(8, open_clip.model.CLIPVisionCfg(**vision), open_clip.model.CLIPTextCfg(**text))
        identity = ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=16,
                patch_size=8,
            ),
            add_pooling_layer=False,
        )
    folder = models / "clip"
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    identity.save_pretrained(models / "identity")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(models / "identity")
