"""Write weights/ from the checkpoints: `python -m personalize_core.mini.export [PART ...]`. fp16 and safetensors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn

from personalize_core.metrics.masks import MiniNetwork
from personalize_core.mini import clip, loop, networks, tokenizer
from personalize_core.mini.networks import Average

WEIGHTS = Path(__file__).parent / "weights"
LIMIT = 30_000_000  # bytes, of all weights together
UNETS = ("named", "varied", "adapted", "unet")  # stages that train it, the last one first
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def averaged(module: nn.Module, checkpoint: Path, name: str = "average") -> nn.Module:
    """The module with the averaged weights of a checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint, so that no trained weights are replaced by untrained ones.
    """
    if not (checkpoint / "checkpoint.safetensors").exists():
        raise FileNotFoundError(
            f"{checkpoint} holds no checkpoint: train that stage first, or name the parts to export"
        )
    average = Average(module)
    loop.load_modules(checkpoint, {name: average})
    return average.module


def pipeline(work: Path) -> StableDiffusionPipeline:
    """The base model as it stands in the checkpoints, float32."""
    words = tokenizer.load()
    torch.manual_seed(0)
    text = networks.text_encoder(len(words), words.eos_token_id)
    checkpoint = loop.last(work, *UNETS)
    network = averaged(networks.unet(), checkpoint)
    text = averaged(text, checkpoint, "text_average")
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True),
        text_encoder=text,
        tokenizer=words,
        unet=network,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_base(work: Path, folder: Path) -> None:
    model = pipeline(work)
    model.set_progress_bar_config(disable=True)
    model.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    with_shipped_tokenizer(folder / "tokenizer")  # with vocab.json and merges.txt, which save_pretrained leaves out


def with_shipped_tokenizer(folder: Path) -> None:
    """The tokenizer that the checkpoints were trained with: built from today's words, it may have other ids."""
    shutil.copytree(tokenizer.FOLDER, folder, dirs_exist_ok=True)


def write_text(work: Path, folder: Path) -> None:
    words = tokenizer.load()
    text = networks.text_encoder(len(words), words.eos_token_id)
    averaged(text, work / "phrased", "text_average").half().save_pretrained(folder)


def write_unet(work: Path, folder: Path) -> None:
    averaged(networks.unet(), loop.last(work, *UNETS)).half().save_pretrained(folder)  # type: ignore[operator]


def write_vae(work: Path, folder: Path) -> None:
    AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).half().save_pretrained(folder)


def write_clip(work: Path, folder: Path) -> None:
    with_shipped_tokenizer(folder)
    vocabulary = len(tokenizer.load(folder))
    torch.manual_seed(0)
    model = averaged(CLIP(**clip.shape(vocabulary)), work / "clip")
    config = clip.shape(vocabulary)
    config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip then reads the tokenizer beside this file
    preprocess = PIXELS | {"size": [64, 64], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "open_clip_model.safetensors")


def write_identity(work: Path, folder: Path) -> None:
    torch.manual_seed(0)
    averaged(networks.identity(), work / "identity", "teacher").half().save_pretrained(folder)
    preparing = {"do_resize": True, "size": {"height": 64, "width": 64}, "do_rescale": True, "do_normalize": True}
    preparing |= {"image_mean": PIXELS["mean"], "image_std": PIXELS["std"], "resample": 3}
    preparing |= {"rescale_factor": 1 / 255, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing, indent=2) + "\n")


def write_segmenter(work: Path, folder: Path) -> None:
    tensors = averaged(MiniNetwork(), work / "segmenter").half().state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# part -> where it goes under weights/, and how it is written
PARTS = {
    "base": ("base", write_base),
    "vae": ("base/vae", write_vae),
    "text": ("base/text_encoder", write_text),
    "unet": ("base/unet", write_unet),
    "clip": ("clip", write_clip),
    "identity": ("identity", write_identity),
    "segmenter": ("segmenter", write_segmenter),
}
ALL = ("base", "clip", "identity", "segmenter")


def export(work: Path = loop.WORK, weights: Path = WEIGHTS, parts: Sequence[str] = ALL):
    """Write new folders of weights, and when all are written and small enough exchange them for the old ones.

    Raises:
        ValueError: the weights would take more than LIMIT bytes; the old ones stay.
    """
    fresh, old = weights.with_name("weights.new"), weights.with_name("weights.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    bytes_after = size_of(weights)
    for part in parts:
        place, write = PARTS[part]
        (fresh / part).mkdir(parents=True)
        write(work, fresh / part)
        for file in (fresh / part).rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files that only their owner reads
        bytes_after += size_of(fresh / part) - size_of(weights / place)
    if bytes_after > LIMIT:
        raise ValueError(f"the weights would take {bytes_after:,} bytes, more than the {LIMIT:,} that may ship")
    for part in parts:
        place = weights / PARTS[part][0]
        if place.exists():
            old.mkdir(exist_ok=True)
            os.replace(place, old / part)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / part, place)
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.strftime('%H:%M:%S')} wrote {', '.join(parts)}: {size_of(weights):,} bytes in {weights}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.export", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless named")
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    export(options.work, options.weights, options.parts or ALL)


if __name__ == "__main__":
    main()
