"""The model card: what every gate measured, on which weights."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.mini import loop
from personalize_core.mini.export import size_of
from personalize_core.mini.gates.pictures import GRID
from personalize_core.mini.gates.thresholds import NEEDED, SEEN, Figures, passed

CARD = "model_card.json"


# gate -> the weights that its figures are about
ABOUT = {
    "autoencoder": ("base/vae",),
    "text": ("base/text_encoder", "base/tokenizer"),
    "clip": ("clip",),
    "identity": ("identity", "base/vae"),
    "unet": ("base",),
    "pictures": ("base",),
    "personalization": ("base", "identity"),
    "names": ("base",),
    "fitted": ("base",),
    "words": ("base", "identity"),
}


def weights_of(gate: str, weights: Path) -> str:
    """A short name for the weights that a gate is about; another one as soon as a byte of them changes."""
    files = sorted(file for part in ABOUT[gate] for file in (weights / part).rglob("*") if file.is_file())
    return stamp_of({str(file.relative_to(weights)): sha256(file) for file in files})


def record_of(gate: str, figures: Figures, measured_on: str, weights: Path) -> dict:
    return {
        "passed": passed(gate, figures),
        "figures": {name: round(value, 5) for name, value in figures.items()},
        "measured on": measured_on,
        "date": time.strftime("%Y-%m-%d"),
        "weights": weights_of(gate, weights),
    }


def written_card(weights: Path) -> dict[str, dict]:
    """The card as the last run wrote it; empty before the first."""
    path = weights / CARD
    return json.loads(path.read_text()) if path.exists() else {"stages": {}, "gates": {}}


def still_true(weights: Path) -> dict[str, dict]:
    """What the card says of gates whose weights have not changed since."""
    gates = written_card(weights)["gates"]
    return {g: record for g, record in gates.items() if g in ABOUT and record.get("weights") == weights_of(g, weights)}


def card(work: Path, weights: Path, gates: dict[str, dict]) -> dict:
    stages = written_card(weights)["stages"]  # of checkpoints long gone, too
    for folder in sorted(work.iterdir()):
        if (folder / "checkpoint.safetensors").exists():
            progress = loop.read_progress(folder)
            stages[folder.name] = {
                "steps": progress.step,
                "samples seen": progress.samples,
                "minutes": round(progress.seconds / 60, 1),
                "device": progress.device,
            }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "data": "scenes drawn by personalize_core.mini.world, 64 x 64 pixels; no photograph, no download",
        "machine": platform.machine(),
        "bytes": size_of(weights),
        "stages": stages,
        "gates": {gate: gates[gate] for gate in ABOUT if gate in gates},
        "prompts of the grid": GRID,
    }


def as_markdown(facts: dict) -> str:
    lines = [
        "# The embedded miniature",
        "",
        f"Written by the run on {facts['date']}. {facts['data'].capitalize()}.",
        "",
        f"All weights together: {facts['bytes']:,} bytes, fp16. Trained on {facts['machine']}.",
        "",
        "| stage | steps | samples seen | minutes | device |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, stage in facts["stages"].items():
        numbers = f"{stage['steps']:,} | {stage['samples seen']:,} | {stage['minutes']}"
        lines.append(f"| {name} | {numbers} | {stage['device']} |")
    lines += ["", "| gate | figure | measured | needed |", "| --- | --- | --- | --- |"]
    for name, gate in facts["gates"].items():
        for figure, value in gate["figures"].items():
            needed = {what: f"{least} of {all_}" for what, least, all_ in SEEN.values()}.get(figure, "")
            needed = NEEDED[name].get(figure, needed)
            lines.append(
                f"| {name} ({'passed' if gate['passed'] else 'not passed'}) | {figure} | {value:.4g} | {needed} |"
            )
    lines += ["", "What each gate was measured on:", ""]
    lines += [f"- {name}: {gate['measured on']} ({gate['date']})." for name, gate in facts["gates"].items()]
    missing = [gate for gate in ABOUT if gate not in facts["gates"]]
    if missing:
        lines.append(f"- {', '.join(missing)}: not measured on these weights.")
    lines += ["", "The autoencoder may also lose at most 3 points of category and of colour.", ""]
    for name, (what, *_) in SEEN.items():
        if name in facts["gates"] and what not in facts["gates"][name]["figures"]:
            lines += [f"Nobody has yet counted, for {name}: {what}.", ""]
    if "personalization" in facts["gates"]:
        lines += ["Each row two images of a concept, then DreamBooth's images of it on new places:", ""]
        lines += ["![eight concepts](personalization.png)", ""]
    if "pictures" in facts["gates"]:
        lines += ["![24 prompts](samples.png)", "", "Row by row:", ""]
        lines += [f"{n}. {prompt}" for n, prompt in enumerate(facts["prompts of the grid"], 1)]
    return "\n".join(lines).rstrip() + "\n"


def write_card(work: Path, weights: Path, gates: dict[str, dict]) -> dict:
    facts = card(work, weights, gates)
    (weights / CARD).write_text(json.dumps(facts, indent=2) + "\n")
    (weights / "MODEL_CARD.md").write_text(as_markdown(facts))
    return facts
