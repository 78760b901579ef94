"""What was seen of a training, beside what was learned: a table, its curves, and the images of the probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import write_json
from personalize_core.training.probe_files import ENDED, PROBE_CURVES, PROBE_IMAGES, PROBES

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from personalize_core.training.watch import Watch

SCHEMA = {
    "stage": str, "step": int, "done": int, "metric": str, "row": int,
    "prompt": str, "value": float,
}  # fmt: skip
MEANINGS = {
    "stage": "the stage of training",
    "step": "how many of its steps were done",
    "done": "how many steps of all stages would be done, were none ended early",
    "metric": "'loss': what a row of inputs that stay the same adds to the diffusion loss of a batch. Of an "
    "image of a probe: 'identity', mean cosine with the held-out concept images, or, where none is held out, with "
    "those trained on; 'text', cosine with the prompt that names the class noun; 'balance', the geometric mean of "
    "both, of which neither counts below 0; 'copying', cosine with the nearest image trained on; 'drift', "
    "1 - cosine with the base model's image of the class noun",
    "row": "which of the fixed inputs, or which of the probe's images, from 0",
    "prompt": "the image's prompt; null for the loss",
    "value": "the metric",
}


def save_record(watch: Watch, prompts: Sequence[str], folder: Path) -> None:
    """Nothing of a method that trains nothing.

    Args:
        prompts: of the images of a probe; the last one is without the concept.
    """
    import polars as pl

    from personalize_core.metrics import parquet
    from personalize_core.report.figures.image_grids import comparison_grid
    from personalize_core.report.figures.probes import probe_curves

    if not watch.ended:  # nothing was trained
        return
    steps, most = (sum(stage[key] for stage in watch.ended.values()) for key in ("steps", "of"))
    write_json(folder / ENDED, {"steps": steps, "of": most, "stages": watch.ended})
    begun: dict[str, int] = {}
    for stage in watch.stages:
        begun[stage.name] = sum(earlier.steps for earlier in watch.stages[: len(begun)])

    def rows(one: dict[str, Any], metric: str, values: Sequence[float], shown: Sequence[str | None]) -> list[dict]:
        of_all = {"stage": one["stage"], "step": one["step"], "done": begun[one["stage"]] + one["step"]}
        return [
            of_all | {"metric": metric, "row": row, "prompt": prompt, "value": value}
            for row, (value, prompt) in enumerate(zip(values, shown, strict=True))
        ]

    found = [rows(one, "loss", one["values"], [None] * len(one["values"])) for one in watch.losses]
    found += [
        rows(one, metric, values, prompts[-1:] if metric == "drift" else prompts[:-1])
        for one in watch.seen
        for metric, values in one["metrics"].items()
    ]
    if not found:
        return
    table = pl.DataFrame([row for some in found for row in some], schema=SCHEMA)
    parquet.write_parquet(table, folder / PROBES, MEANINGS)
    probe_curves(table, {name: begun[name] for name, end in watch.ended.items() if end["of"]}, folder / PROBE_CURVES)
    if watch.seen:
        columns = [f"{one['stage']}, step {one['step']}".replace("_", " ") for one in watch.seen]
        images = [opened(pictures) for pictures in watch.pictures]
        shown = {prompt: [[each[row]] for each in images] for row, prompt in enumerate(prompts)}
        comparison_grid([], shown, columns, folder / PROBE_IMAGES)


def opened(images: Tensor) -> list[Image.Image]:
    """images: (N, H, W, 3) uint8, on the CPU."""
    from PIL import Image

    return [Image.fromarray(one) for one in images.numpy()]
