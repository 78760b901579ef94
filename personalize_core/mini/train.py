"""Train one stage of the miniature: `python -m personalize_core.mini.train STAGE`."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from personalize_core.mini import loop
from personalize_core.mini.autoencoder import freeze

# stage -> (module, class, steps of its schedule)
STAGES = {
    "autoencoder": ("autoencoder", "Autoencoder", 6000),
    "refined": ("autoencoder", "Refined", 10000),
    "text": ("text", "Text", 600),
    "unet": ("diffusion", "Diffusion", 12000),
    "adapted": ("diffusion", "Adapted", 12000),
    "phrased": ("phrased", "Phrased", 2600),
    "varied": ("varied", "Varied", 4000),
    "named": ("named", "Named", 9000),
    "clip": ("clip", "Clip", 3000),
    "identity": ("identity", "Identity", 1000),
    "classifier": ("classifier", "Classifier", 2500),
    "name_reader": ("name_reader", "NameReader", 1200),
    "segmenter": ("segmenter", "Segmenter", 1200),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.train", description=__doc__)
    parser.add_argument(
        "stage", choices=[*STAGES, "freeze"], help="freeze settles the latents after autoencoder and after refined"
    )
    parser.add_argument("--steps", type=int, help="length of the schedule")
    parser.add_argument("--minutes", type=float, help="stop after this long; a later call goes on from there")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--look-every", type=int, default=500)
    parser.add_argument("--pid", type=Path, help="write this process's number there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.pid:
        options.pid.write_text(str(os.getpid()))
    if options.stage == "freeze":
        return freeze(options.work)
    module, name, steps = STAGES[options.stage]
    given = {k: v for k, v in (("lr", options.lr), ("batch", options.batch)) if v is not None}
    if options.stage in ("unet", "adapted", "varied", "named", "identity", "segmenter"):
        given["work"] = options.work
    stage = getattr(importlib.import_module(f"personalize_core.mini.{module}"), name)(
        seed=options.seed, device=options.device, **given
    )
    loop.train(
        stage,
        options.steps or steps,
        options.work,
        device=options.device,
        minutes=options.minutes,
        look_every=options.look_every,
    )


if __name__ == "__main__":
    main()
