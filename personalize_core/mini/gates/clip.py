"""Zero-shot accuracy of the text-image encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from personalize_core.mini import clip
from personalize_core.mini.autoencoder import scenes
from personalize_core.mini.gates.thresholds import Figures


def clip_gate(folder: Path) -> tuple[Figures, str]:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}").tokenizer
    images, _, rendered = scenes(np.random.default_rng(2**20), 400, plain=1, photo=1, studio=0)
    found = clip.accuracy(model, words, rendered, images)
    return {f"zero-shot {a}": share for a, share in found.items()}, "400 fresh renders"
