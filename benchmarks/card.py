"""Ten minutes on one graphics card, without network: `python -m benchmarks.card`.

AttnDreamBooth's published recipe at the shapes of Stable Diffusion 2.1-base, those of Personalized Residuals and
Textual Inversion at the shapes of 1.4, with random weights; beside them diffusers' scripts on identical work; 100
images sampled and scored beside the stock pipeline and open_clip; the card's matrix rates and peak memory. Results are
printed as a table and written as JSON.

It always ends in time. Each part gets a share of it, and does as much as fits: of a recipe that would take longer, a
part of each stage's steps is measured. Results are written after every part, and when the time is over the script ends
with those it has. A part that fails, such as for lack of memory, is reported, and the others are measured.

With `--device cpu --size tiny` it runs on a CPU, which shows that it works.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

# isort: off
import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch
import torch
# isort: on

from benchmarks.suite import quiet, table
from benchmarks.suite.floor import matrix_rate
from benchmarks.suite.models import Precision, Size
from benchmarks.suite.recipe_cost import RecipeCost, measure_recipe
from benchmarks.suite.sampling import compare_sampling
from benchmarks.suite.scoring import compare_scoring
from benchmarks.suite.setting import ROOT, Models, Setting
from benchmarks.suite.timing import Deadline, Measured, load
from benchmarks.suite.training import compare_training
from personalize_core.files.atomic import write_json

RESULTS = ROOT / "data" / ".work" / "bench"
SECONDS = 570.0  # of ten minutes, so that all has been written by their end


@dataclass
class Found:
    """What has been measured so far."""

    path: Path
    about: dict[str, Any]
    recipes: list[RecipeCost] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # part -> why it has no result
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, result: RecipeCost | Measured) -> None:
        if isinstance(result, RecipeCost):
            self.recipes.append(result)
        else:
            self.rows.append(result)

    def write(self) -> None:
        with self.lock:
            written = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            parts = {"recipes": [each.as_json() for each in self.recipes], "rows": [row.as_json() for row in self.rows]}
            taken = {"written": written, "seconds": time.monotonic() - self.began}
            write_json(self.path, self.about | parts | {"failed": self.failed} | taken)

    def report(self) -> str:
        """All of it as text."""
        lines = [f"{name}: {value}" for name, value in self.about.items()]
        lines += ["", *recipe_table(self.recipes), "", table.markdown(self.rows)]
        lines += ["", *(f"not measured: {part}: {why}" for part, why in self.failed.items())]
        return "\n".join(lines)


def recipe_table(recipes: list[RecipeCost]) -> list[str]:
    """A line for each stage, as Markdown."""
    head = ("recipe", "stage", "steps", "measured", "a step", "floor", "all published steps", "peak memory")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for recipe in recipes:
        peak = recipe.memory.get("peak_memory_bytes")
        for stage in recipe.stages:
            cells = (
                f"{recipe.method}, {recipe.size}",
                stage.name,
                str(stage.published_steps),
                str(stage.measured_steps),
                f"{1000 * stage.seconds_per_step:.3g} ms",
                f"{1000 * stage.floor:.3g} ms",
                f"{recipe.seconds:.0f} s",
                "" if peak is None else f"{peak / 2**30:.1f} GiB of {recipe.memory['memory_of']}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines


@dataclass(frozen=True)
class Part:
    """One measurement, and its share of the time."""

    name: str
    share: float  # of all seconds
    measure: Callable[[Setting], RecipeCost | Measured]  # its setting's deadline is the part's


def recipe_part(name: str, share: float) -> Part:
    return Part(f"recipe of {name}", share, lambda setting: measure_recipe(setting, name, setting.deadline))


def training_part(name: str, share: float, **changes: Any) -> Part:
    return Part(f"training by {name}", share, lambda setting: compare_training(setting, name, changes))


def sampling_part(setting: Setting) -> Measured:
    """Without a round that does not count, for which there is no time: looking for the best batch has warmed up."""
    return compare_sampling(replace(setting, uncounted=0), "base_model")[0]


# The shares leave a sixth for making the models. DreamBooth at AttnDreamBooth's batch size is what its last stage
# does, without the penalty.
PARTS: dict[Size, list[Part]] = {
    "sd-2.1-base": [
        recipe_part("attn_dreambooth", 0.25),
        training_part("dreambooth", 0.07, batch_size=8, prior_preservation=False),
    ],
    "sd-1.4": [
        recipe_part("personalized_residuals", 0.06),
        recipe_part("textual_inversion", 0.12),
        training_part("textual_inversion", 0.07),
        training_part("lora_dreambooth", 0.05),
        Part("sampling", 0.17, sampling_part),
        Part("scoring", 0.05, compare_scoring),
    ],
}


def run(found: Found, size: Size | None, device: str, precision: Precision, seconds: float) -> None:
    """All parts, one base model after the other, so that only one of them takes memory.

    Args:
        size: of all base models, instead of their own.
    """
    deadline, amounts = Deadline(seconds), (3, 10, 100, 25) if size is None else (1, 2, 4, 2)
    for own_size, parts in PARTS.items():
        models = Models(size or own_size, device, precision)
        for part in parts:
            if not deadline.left:
                found.failed[part.name] = "no time was left"
                continue
            try:
                result = part.measure(Setting(models, *amounts, deadline.within(part.share * seconds)))
            except Exception as error:  # whatever one part dies of, the others are still worth measuring
                found.failed[part.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                found.add(result)
            found.write()
            print(f"{time.monotonic() - found.began:5.0f} s  {part.name}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


def rates(device: str) -> dict[str, float]:
    """Operations a second of matrix products, by type; "tf32" is float32 with the tensor cores of a graphics card."""
    found = {"fp32": matrix_rate(device, torch.float32), "bf16": matrix_rate(device, torch.bfloat16)}
    if device == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        found["tf32"] = matrix_rate(device, torch.float32)
        torch.set_float32_matmul_precision(before)
    return found


def main(arguments: list[str] | None = None) -> Path:
    """Returns the file with the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="by when it ends, with what it has")
    parser.add_argument("--size", choices=["tiny"], help="of all base models, instead of Stable Diffusion's shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16", help="of the U-Net")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no graphics card here; --device cpu --size tiny shows that the script runs")

    about: dict[str, Any] = {"machine": table.machine(chosen.device), "load": load(), "precision": chosen.precision}
    about["command"] = " ".join(["python -m benchmarks.card", *(sys.argv[1:] if arguments is None else arguments)])
    found = Found(chosen.results / "card.json", about)

    def give_up() -> None:
        found.failed["the rest"] = f"the time of {chosen.seconds:.0f} s was over"
        found.write()
        print(found.report(), flush=True)
        os._exit(0)

    end = threading.Timer(chosen.seconds, give_up)
    end.daemon = True
    end.start()
    found.about["matrix_rates"] = rates(chosen.device)
    run(found, chosen.size, chosen.device, chosen.precision, chosen.seconds)
    end.cancel()
    found.write()
    print(found.report())
    return found.path


if __name__ == "__main__":
    quiet.hide_notices()
    main()
