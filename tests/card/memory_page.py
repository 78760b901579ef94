"""docs/memory.md, from the recorded costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from personalize_core.errors import listed
from personalize_core.methods import RECIPES
from personalize_core.training.readings import TOGETHER
from tests.card.cells import MEASURED_AGAIN, METHODS, ON_XL, XL, Cell, Setting, published_base
from tests.card.ratchet import ROOM, Recorded

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
HEADS: Mapping[Setting, str] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "bf16+checkpointing": "bf16, gradient checkpointing",
}

INTRODUCTION = """# Memory

How much memory of a graphics card does a method need, and how much does it compute? The tables are for the published
recipes, at 512 pixels; the last is for Stable Diffusion XL at 1024. `make memory` writes this page.

The numbers were not measured on a card. `tests/card` runs training and sampling on a CPU with tensors that say they
lie on a card, at the true shapes and without values, along the paths that PyTorch takes on CUDA: its autocast lists,
its optimizer, its attention kernels of cards since Ampere. It counts the bytes of all tensors that live at once. A real
card needs more:

* the CUDA context of each process;
* workspaces of the kernels, and what the allocator loses to fragmentation;
* with gradient checkpointing, perhaps more for a probe, where a training is [watched](watching_training.md), than for a
  step: in bf16 LoRA's takes 3.1 GiB, T-LoRA's 3.3 and DreamBooth's 14.3. In bf16 without it none takes more.

`make test-card` measures {again} of these {all} trainings again, among them each method in bf16, and compares them with
what is recorded: memory to {room:.0%}; FLOPs, waits and copies exactly. `make memory` measures all.
"""
TRAINING = """
## Training

The most that is held at once in any stage of training, in GiB, on the base model that the recipe is for: Stable
Diffusion 1.4, whose shapes 1.5 shares, or 2.1-base. "Proof" is while the artifact is checked after training. Then two
processes hold the base model and what was learned: the trainer, and the one that restores the artifact; the number is
for both.
"""
STEPS = """
## A step of training

In bf16. The peak is in GiB, in brackets that within the optimizer's own step. TFLOP are those in bfloat16, mostly the
U-Net's, and those in float32, mostly the text encoder's. A wait is an operation whose result the host needs before it
goes on, such as `item` and `nonzero`. Copies are those between the memories of host and card, in brackets those that
the host waits for too. Not among them is the one in {steps} steps that brings the losses.
"""
SAMPLING = """
## A step of sampling

Of 16 images, which is how many are sampled at once, in bf16; with LAG where the method has it. Decoding is not
included.
"""


ON_STABLE_DIFFUSION_XL = """
## Stable Diffusion XL

At 1024 pixels, in bf16: the most that is held at once in a step of training, in GiB, and what such a step computes in
bf16, in TFLOP; as published, and with gradient checkpointing and one image of the concept in a step (and one class
image, where the recipe has some). Sampling is a step of 4 images, as many as are sampled at once.

With one image and gradient checkpointing tensors fit into 24 GiB for {small}, and into 48 GiB for {middle}{large}.
"""
XL_HEADS: Mapping[Setting, str] = {"bf16": "as published", "bf16+checkpointing+one": "one image, checkpointing"}


def text(recorded: Mapping[Cell, Recorded]) -> str:
    """The whole page."""
    introduction = INTRODUCTION.format(again=len(MEASURED_AGAIN), all=len(recorded), room=ROOM)
    parts = [introduction, TRAINING, _training(recorded), STEPS.format(steps=TOGETHER), _steps(recorded)]
    parts += [SAMPLING, _sampling(recorded), _fitting(recorded), _on_xl(recorded)]
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def _training(recorded: Mapping[Cell, Recorded]) -> str:
    rows = []
    for method in METHODS:
        base = published_base(method)
        cells = [recorded[Cell(base, method, setting)] for setting in HEADS]
        proofs = [_gib(2 * cell["memory"]["proof_mib"]) for cell in cells[:2]]
        rows.append([_link(method), base, *(_gib(_peak(cell)) for cell in cells), *proofs])
    heads = ["method", "base model", *HEADS.values(), "proof, fp32", "proof, bf16"]
    return _table(heads, rows)


def _peak(cell: Recorded) -> int:
    return max(numbers["peak_mib"] for part, numbers in cell.items() if part.startswith("training, "))


def _steps(recorded: Mapping[Cell, Recorded]) -> str:
    rows = []
    for method in METHODS:
        base = published_base(method)
        for part, numbers in recorded[Cell(base, method, "bf16")].items():
            kind, _, stage = part.partition(", ")
            if kind == "training":
                peak = f"{_gib(numbers['peak_mib'])} ({_gib(numbers['in_optimizer_mib'])})"
                rows.append([_link(method), stage, base, peak, *_counts(numbers)])
    return _table(["method", "stage", "base model", "peak", "TFLOP", "waits", "copies"], rows)


def _sampling(recorded: Mapping[Cell, Recorded]) -> str:
    rows = []
    for method in METHODS:
        base = published_base(method)
        for part, numbers in recorded[Cell(base, method, "bf16")].items():
            kind, _, strategy = part.partition(", ")
            if kind == "sampling":
                rows.append([_link(method), strategy, base, _gib(numbers["peak_mib"]), *_counts(numbers)])
    return _table(["method", "strategy", "base model", "peak", "TFLOP", "waits", "copies"], rows)


def _fitting(recorded: Mapping[Cell, Recorded]) -> str:
    peaks = {method: _peak(recorded[Cell(XL, method, "bf16+checkpointing+one")]) / 1024 for method in ON_XL}
    small = [RECIPES[method].display_name for method, peak in peaks.items() if peak < 24]
    middle = [RECIPES[method].display_name for method, peak in peaks.items() if 24 <= peak < 48]
    large = [RECIPES[method].display_name for method, peak in peaks.items() if peak >= 48]
    more = f"; not for {listed(large)}" if large else ""
    return ON_STABLE_DIFFUSION_XL.format(small=listed(small), middle=listed(middle), large=more)


def _on_xl(recorded: Mapping[Cell, Recorded]) -> str:
    rows = []
    for method in ON_XL:
        cells = {setting: recorded[Cell(XL, method, setting)] for setting in XL_HEADS}
        sampling = cells["bf16"]["sampling, plain"]
        steps = [text for cell in cells.values() for text in (_gib(_peak(cell)), _most_flops(cell))]
        rows.append([_link(method), *steps, _gib(sampling["peak_mib"]), _counts(sampling)[0]])
    heads = [text for head in XL_HEADS.values() for text in (head, "TFLOP")]
    heads = ["method", *heads, "sampling", "sampling, TFLOP"]
    return _table(heads, rows)


def _most_flops(cell: Recorded) -> str:
    """Of the stage whose steps compute most."""
    steps = [numbers for part, numbers in cell.items() if part.startswith("training, ")]
    return f"{max(numbers['gflop_bfloat16'] for numbers in steps) / 1000:.1f}"


def _counts(numbers: Mapping[str, int]) -> list[str]:
    flops = " + ".join(f"{numbers.get(f'gflop_{dtype}', 0) / 1000:.2f}" for dtype in ("bfloat16", "float32"))
    return [flops, str(numbers["waits"]), f"{numbers['copies']} ({numbers['blocking_copies']})"]


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f}"


def _link(method: str) -> str:
    name = RECIPES[method].display_name
    return f"[{name}](methods.md#{name.lower().replace(' ', '-').replace('+', '')})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
