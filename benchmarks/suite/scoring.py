"""Scores of images by ours, and by open_clip and transformers as a script would use them, in batches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.suite.encoders import EncoderFolders, encoder_folders
from benchmarks.suite.floor import flops_of
from benchmarks.suite.setting import CONCEPT, ROOT, Setting
from benchmarks.suite.timing import Measured, seconds_of, take_turns, timed
from personalize_core.metrics import features, scoring
from personalize_core.workspace.recipes import MOST_WORKERS

PER_PROMPT = 4  # images
BATCHES = (1, 8, 32, 128)
CONCEPT_IMAGES = sorted((ROOT / "data" / "concepts" / CONCEPT.name).glob("*.png"))


class OpenClipScripts:
    """CLIP-T, CLIP-I and DINO of a list of images, in batches; one thread reads, prepares and encodes."""

    def __init__(self, folders: EncoderFolders, device: str) -> None:
        import open_clip
        from transformers import ViTImageProcessor, ViTModel

        made: Any = open_clip.create_model_and_transforms(f"local-dir:{folders.clip}")
        self.clip, self.prepare = made[0].eval().to(device), made[2]
        self.read, self.device = open_clip.get_tokenizer(f"local-dir:{folders.clip}"), device
        vit: Any = ViTModel.from_pretrained(folders.identity, add_pooling_layer=False, dtype=torch.float32)
        self.vit = vit.eval().to(device)
        self.processor = ViTImageProcessor.from_pretrained(folders.identity)

    @torch.inference_mode()
    def scores(self, paths: Sequence[Path], texts: Sequence[str], concept_images: Sequence[Path], batch: int) -> Tensor:
        """(N, 3); texts: one for each image."""
        known_clip, known_vit = self._features(concept_images, batch)
        clip, vit = self._features(paths, batch)
        distinct = sorted(set(texts))
        said = self.clip.encode_text(self.read(distinct).to(self.device), normalize=True).cpu()
        own = said[[distinct.index(text) for text in texts]]
        pairs = [(clip * own).sum(dim=1), (clip @ known_clip.mT).mean(dim=1), (vit @ known_vit.mT).mean(dim=1)]
        return torch.stack(pairs, dim=1)

    def _features(self, paths: Sequence[Path], batch: int) -> tuple[Tensor, Tensor]:
        clip, vit = [], []
        for start in range(0, len(paths), batch):
            images = [Image.open(path, formats=("PNG",)).convert("RGB") for path in paths[start : start + batch]]
            pixels = torch.stack([self.prepare(image) for image in images]).to(self.device)
            clip.append(self.clip.encode_image(pixels, normalize=True).cpu())
            prepared = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
            vit.append(F.normalize(self.vit(pixel_values=prepared).last_hidden_state[:, 0], dim=1).cpu())
        return torch.cat(clip), torch.cat(vit)

    def best_batch(self, score: Callable[[int], Any], most: int) -> int:
        """How many images at once take the least time."""
        score(1)
        sizes = [each for each in BATCHES if each <= max(most, 1)]
        found = {batch: seconds_of(lambda batch=batch: score(batch), self.device) for batch in sizes}
        return min(found, key=lambda batch: found[batch])


def write_grid(folder: Path, images: int, side: int) -> tuple[list[Path], list[str]]:
    """A grid of smooth random images; returns their files, and the text of each."""
    generator = np.random.default_rng(0)
    prompts = -(-images // PER_PROMPT)
    templates = [f"a photo of a {{}} number {prompt}" for prompt in range(prompts)]
    about = {"base_model": "random", "concept": CONCEPT.name, "class_noun": CONCEPT.class_noun, "method": "base_model"}
    about |= {"variants": ["base_model"], "templates": templates, "images_per_prompt": PER_PROMPT}
    (folder / "base_model").mkdir(parents=True)
    (folder / "grid.json").write_text(json.dumps(about))
    paths, texts = [], []
    for prompt, template in enumerate(templates):
        for image in range(PER_PROMPT):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            paths.append(folder / "base_model" / f"{prompt:02d}_{image:02d}.png")
            small.resize((side, side), Image.Resampling.BICUBIC).save(paths[-1])
            texts.append(template.replace("{}", CONCEPT.class_noun))
    return paths, texts


def compare_scoring(setting: Setting) -> Measured:
    """From PNG files to three scores of each image; texts and concept images are encoded every time."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = encoder_folders(setting.models.size, root)
        encoders = features.load_encoders(
            [str(folders.clip)], [str(folders.identity)], None, ["class_phrase"], setting.models.device
        )
        script = OpenClipScripts(folders, setting.models.device)
        paths, texts = write_grid(root / "grid", setting.images, setting.models.base.image_size)
        how = features.Processing(1 if setting.models.device == "cpu" else MOST_WORKERS, setting.models.device)

        def ours() -> scoring.Scored:
            return scoring.score_grid(root, root / "grid", CONCEPT, CONCEPT_IMAGES, encoders, processing=how)

        def theirs(batch: int) -> Tensor:
            return script.scores(paths, texts, CONCEPT_IMAGES, batch)

        best = script.best_batch(theirs, len(paths))
        wide = ours().table.pivot("metric", index=["prompt_index", "image_index"], values="score")
        own = wide.sort("prompt_index", "image_index").select("clip_t", "clip_i", "dino").to_numpy()
        apart = float(np.abs(own - theirs(best).numpy()).max())
        flops = flops_of(lambda: theirs(best)) / len(paths)  # ours may work in several threads, which are not seen
        ways = {
            "ours": timed(lambda: ours().table, setting.models.device),
            "theirs": timed(lambda: theirs(best), setting.models.device),
        }
        times = take_turns(ways, setting.rounds, setting.deadline, uncounted=0)  # all ran before
    about = f"{len(paths)} images, open_clip at {best} at once"
    what, who = "CLIP-T, CLIP-I, DINO", "open_clip and transformers"
    return setting.measured(
        "scoring", what, who, "image", times, units=len(paths), flops=flops, apart=apart, about=about
    )
