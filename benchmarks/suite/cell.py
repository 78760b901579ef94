"""Whole cells: concept images to a trained artifact, images and scores, by ours and by a user's scripts.

Ours also proves that the artifact can be read again, measures the loss on a fixed batch before and after, plots the
losses, and stamps everything; the scripts do none of it. Neither side loads models within the time.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torchvision import transforms

from benchmarks.suite.encoders import EncoderFolders, encoder_folders
from benchmarks.suite.rows import Rows
from benchmarks.suite.scoring import OpenClipScripts
from benchmarks.suite.scripts.training_script import TrainingScript
from benchmarks.suite.setting import CONCEPT, ROOT, Setting
from benchmarks.suite.timing import Measured, take_turns, timed
from benchmarks.suite.training import PAIRS
from personalize_core import steps
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.methods.interface import Method
from personalize_core.methods.recipe import Recipe
from personalize_core.workspace.store import Store

CELLS = ("textual_inversion", "lora_dreambooth")
PROMPTS = "mini"  # of data/prompts
GUIDANCE = 7.5
ROUNDS = 3  # at most


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much one cell does."""

    steps: int  # of the training
    images_per_prompt: int
    sampling_steps: int


def compare_cell(setting: Setting, name: str, amounts: Amounts, best_batch: int) -> Measured:
    """best_batch: the stock pipeline's."""
    changed: Any = setting.recipe(name)
    config = dataclasses.replace(changed, steps=amounts.steps)
    with tempfile.TemporaryDirectory() as temporary:
        root, fresh, results = (Path(temporary, folder) for folder in ("workspace", "fresh", "theirs"))
        folders = encoder_folders(setting.models.size, Path(temporary, "encoders"))
        _write_workspace(root, setting, name, config, amounts, folders)
        root.rename(fresh)
        script = OpenClipScripts(folders, setting.models.device)
        theirs = _Theirs(setting, name, config, amounts, best_batch, script, results)

        def before() -> None:
            for folder in (root, results):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(fresh, root)
            theirs.start()

        ways = {
            "ours": timed(lambda: _ours(root, name), setting.models.device),
            "theirs": timed(theirs.run, setting.models.device),
        }
        times = take_turns(ways, min(setting.rounds, ROUNDS), setting.deadline, before, setting.uncounted)
    images = len(_templates()) * amounts.images_per_prompt
    about = f"{amounts.steps} steps, {images} images of {amounts.sampling_steps} steps; ours also proves and plots"
    who = f"{PAIRS[name].name}, stock pipeline, open_clip"
    return setting.measured("whole cell", name, who, "cell", times, about=about)


def _templates() -> list[str]:
    return read_list(ROOT / "data" / "prompts" / f"{PROMPTS}.txt")


def _write_workspace(
    root: Path, setting: Setting, name: str, config: Recipe, amounts: Amounts, folders: EncoderFolders
) -> None:
    base = "mini"
    if setting.models.size != "mini":
        base = str(root.parent / "base")
        setting.models.parts.copied().pipeline("cpu", "fp32").save_pretrained(base)
    shutil.copytree(ROOT / "data" / "concepts" / CONCEPT.name, root / "data" / "concepts" / CONCEPT.name)
    (root / "data" / "prompts").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "prompts" / f"{PROMPTS}.txt", root / "data" / "prompts")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    changes = values["methods"][name].get(base, {}) | {"steps": amounts.steps}
    sampling = {"steps": amounts.sampling_steps, "images_per_prompt": amounts.images_per_prompt, "guidance": GUIDANCE}
    values |= {"base_model": base, "precision": setting.models.precision, "device": setting.models.device}
    values |= {"methods": {"base_model": {}, name: {base: changes}}, "variants": {}, "automation": {}, "judge": None}
    values["sampling"] |= sampling | {"prompts": PROMPTS}
    values["encoders"] = {
        "text_image": [str(folders.clip)],
        "identity": [str(folders.identity)],
        "segmenter": None,
        "texts": ["class_phrase"],
    }
    (root / "params.yaml").write_text(yaml.safe_dump(values))


def _ours(root: Path, name: str) -> None:
    store = Store(root)
    for step in (steps.train, steps.sample_grid, steps.score):
        step(store, CONCEPT.name, name)


class _Theirs:
    """A user's scripts, one after the other, from the same concept images."""

    def __init__(
        self,
        setting: Setting,
        name: str,
        config: Any,
        amounts: Amounts,
        best_batch: int,
        scores: OpenClipScripts,
        folder: Path,
    ) -> None:
        self.setting, self.name, self.config, self.amounts = setting, name, config, amounts
        self.best_batch, self.scores, self.folder = best_batch, scores, folder
        self.concept_images = sorted((ROOT / "data" / "concepts" / CONCEPT.name).glob("*.png"))
        self.start()

    def start(self) -> None:
        """Models as they are loaded."""
        models = self.setting.models
        self.parts = models.parts.copied()
        self.method: Method = self.setting.method(self.name, self.config)
        self.pipe = models.parts.copied().pipeline(models.device, models.precision)
        self.script: TrainingScript = PAIRS[self.name].script(
            self.parts, self.method, models.base, models.device, models.precision
        )
        self.script.cast(self.parts.vae.requires_grad_(False).to(self.script.device))

    def run(self) -> None:
        self.folder.mkdir(parents=True)
        self.script.train(self._rows())
        self._load_into_pipeline()
        said = self._prompts()
        paths = [self.folder / f"{number:03d}.png" for number in range(len(said))]
        for start in range(0, len(said), self.best_batch):
            rows = slice(start, start + self.best_batch)
            options = {"num_inference_steps": self.amounts.sampling_steps, "guidance_scale": GUIDANCE}
            for path, image in zip(paths[rows], self.pipe(said[rows], **options).images, strict=True):
                image.save(path)
        texts = [template.replace("{}", CONCEPT.class_noun) for template in self._templates()]
        found = self.scores.scores(paths, texts, self.concept_images, 32)
        (self.folder / "scores.json").write_text(json.dumps(found.tolist()))

    def _prompts(self) -> list[str]:
        return self.script.words([self.method.say(template) for template in self._templates()])

    def _templates(self) -> list[str]:
        """Of each image."""
        return [template for template in _templates() for _ in range(self.amounts.images_per_prompt)]

    def _rows(self) -> Iterator[Rows]:
        """The scripts' data sets: each image is opened, prepared and encoded anew whenever its turn comes."""
        size, learns_word = self.setting.models.base.image_size, self.name == "textual_inversion"
        bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
        geometry: list[Any] = (
            [transforms.Resize((size, size), bicubic), transforms.RandomHorizontalFlip()]
            if learns_word
            else [transforms.Resize(size, bilinear), transforms.RandomCrop(size)]
        )
        prepare: Any = transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        templates = read_list(TRAINING / f"{self.config.templates}.txt") if learns_word else ["a photo of {}"]
        vae, device, batch = self.parts.vae, self.script.device, self.config.batch_size
        coming: list[Path] = []
        for _ in range(self.amounts.steps):
            while len(coming) < batch:
                coming += random.sample(self.concept_images, len(self.concept_images))
            chosen, coming = coming[:batch], coming[batch:]
            images = [ImageOps.exif_transpose(Image.open(path, formats=("PNG",))).convert("RGB") for path in chosen]
            pixels = torch.stack([prepare(image) for image in images]).to(device, self.script.dtype)
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            t = torch.randint(0, 1000, (batch,), device=device)
            prompts = [self.method.say(random.choice(templates)) for _ in range(batch)]
            yield Rows(latents, torch.randn_like(latents), t, prompts, torch.ones(batch, 1, 1, 1))

    def _load_into_pipeline(self) -> None:
        """Save what was learned as the script does, and load it as its documentation says."""
        script: Any = self.script
        if self.name == "textual_inversion":
            encoder = script.accelerator.unwrap_model(script.text_encoder)
            learned = encoder.get_input_embeddings().weight[script.word].detach().cpu()
            save_file({CONCEPT.placeholder: learned[None]}, self.folder / "learned_embeds.safetensors")
            self.pipe.load_textual_inversion(str(self.folder / "learned_embeds.safetensors"))
            return
        unet = script.accelerator.unwrap_model(script.unet)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(str(self.folder), unet_lora_layers=layers)
        self.pipe.load_lora_weights(str(self.folder))
        self.pipe.fuse_lora()
