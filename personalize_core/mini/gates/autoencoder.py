"""How well the autoencoder gives images back, and what a classifier still reads from them."""

from __future__ import annotations

import numpy as np

from personalize_core.mini import classifier
from personalize_core.mini.autoencoder import psnr, scenes
from personalize_core.mini.gates.image_sets import concept_images, reconstructed
from personalize_core.mini.gates.thresholds import Figures


def autoencoder_gate(vae, judge: classifier.Network, fresh: int = 200, read_on: int = 400) -> tuple[Figures, str]:
    rng = np.random.default_rng(2**20)
    images, _, _ = scenes(rng, fresh)
    photos = concept_images()
    figures = {
        "dB on fresh scenes": float(psnr(images, reconstructed(vae, images)).mean()),
        "dB on the concepts": float(psnr(photos, reconstructed(vae, photos)).mean()),
    }
    images, _, rendered = scenes(rng, read_on, plain=1, photo=1)
    truth = classifier.truths(rendered)
    for kind, shown in (("originals", images), ("reconstructions", reconstructed(vae, images))):
        read = classifier.verdicts(judge, shown)
        for aspect in ("category", "colour"):
            figures[f"{aspect} read from {kind}"] = float((read[aspect] == truth[aspect]).float().mean())
    return figures, f"{fresh} fresh scenes, the concepts' {len(photos)} photographs; read from {read_on} others"
