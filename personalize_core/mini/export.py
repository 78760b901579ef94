"""Write weights/ from the checkpoints: `python -m personalize_core.mini.export`. fp16, safetensors, all or nothing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn

from personalize_core.mini import clip, loop, networks, tokenizer
from personalize_core.mini.identity import Student
from personalize_core.mini.networks import Average

WEIGHTS = Path(__file__).parent / "weights"
LIMIT = 30_000_000  # bytes, of all weights together
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def averaged(module: nn.Module, checkpoint: Path, name: str = "average") -> nn.Module:
    """The module with the averaged weights of a checkpoint, or as it was initialised where there is none."""
    average = Average(module)
    if (checkpoint / "checkpoint.safetensors").exists():
        loop.load_modules(checkpoint, {name: average})
    else:
        print(f"{checkpoint} holds no checkpoint: its network stays untrained")
    return average.module


def autoencoder(work: Path) -> AutoencoderKL:
    """The frozen autoencoder, with the decoder that went on training if there is one."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    if (work / "decoder" / "checkpoint.safetensors").exists():
        vae = averaged(vae, work / "decoder")  # type: ignore[arg-type]
    return vae  # type: ignore[return-value]


def pipeline(work: Path) -> StableDiffusionPipeline:
    """The base model as it stands in the checkpoints, float32."""
    words = tokenizer.load()
    torch.manual_seed(0)
    text = networks.text_encoder(len(words), words.eos_token_id)
    network = averaged(networks.unet(), work / "unet")
    text = averaged(text, work / "unet", "text_average")
    return StableDiffusionPipeline(
        vae=autoencoder(work),
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
    tokenizer.build(folder / "tokenizer")  # with vocab.json and merges.txt, which save_pretrained leaves out


def write_clip(work: Path, folder: Path) -> None:
    tokenizer.build(folder)
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
    student = averaged(Student(), work / "identity", "teacher")
    student.vit.half().save_pretrained(folder)  # type: ignore[union-attr]
    preparing = {"do_resize": True, "size": {"height": 64, "width": 64}, "do_rescale": True, "do_normalize": True}
    preparing |= {"image_mean": PIXELS["mean"], "image_std": PIXELS["std"], "resample": 3}
    preparing |= {"rescale_factor": 1 / 255, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing, indent=2) + "\n")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def export(work: Path = loop.WORK, weights: Path = WEIGHTS) -> None:
    """Write a new folder of weights beside the old one, then exchange them."""
    fresh, old = weights.with_name("weights.new"), weights.with_name("weights.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_base(work, fresh / "base")
    write_clip(work, fresh / "clip")
    write_identity(work, fresh / "identity")
    for kept in ("model_card.json", "MODEL_CARD.md", "samples.png"):
        if (weights / kept).exists():
            shutil.copy(weights / kept, fresh / kept)
    if size_of(fresh) > LIMIT:
        raise ValueError(f"the weights take {size_of(fresh):,} bytes, more than the {LIMIT:,} that may ship")
    if weights.exists():
        os.replace(weights, old)
    os.replace(fresh, weights)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{time.strftime('%H:%M:%S')} wrote {size_of(weights):,} bytes to {weights}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.export", description=__doc__)
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    export(options.work, options.weights)


if __name__ == "__main__":
    main()
