"""Embedding drift: how far the placeholder's embedding went, and which words it is near.

AttnDreamBooth (Pang et al. 2024, sec. 3): tuned together with the U-Net it hardly moves, tuned alone it moves far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from personalize_core.analyses import shared_plots
from personalize_core.analyses.findings import Findings
from personalize_core.analyses.inputs import Inputs
from personalize_core.analyses.learned_embedding import LOOKS, WORDS, cosines, nearest_words, vocabulary
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.style import COLOURS, GREY, INK, PALE, STYLE, save_figure

TITLE = "Embedding drift"
HOW = (
    "What the text encoder reads in the placeholder's place, before and after training: the cosine of the two, the "
    "ratio of their norms, and the nearest whole words of the vocabulary by the cosine of input embeddings. The log of "
    f"the training holds the words too, at {LOOKS} places, or at every step of a shorter one."
)
STEP_MEANINGS = {
    "step": "of the whole training, from 0",
    "stage": "its name",
    "cosine": "of the embedding after the step with the one before training; the mean, where there are several",
    "norm_ratio": "its norm over the one before training; the ratio of means, where there are several",
}
DURING_MEANINGS = {
    "step": "of the whole training, from 0; the words are those after it",
    "stage": "its name",
    "layer": "the cross-attention layer whose embedding it is; null where all layers read one",
    "rank": "1 is the nearest",
    "word": "a whole word of the tokenizer's vocabulary",
    "cosine": "of its input embedding with the placeholder's",
    "cosine_with_start": "of what is read for the placeholder with what was read before training; the mean of layers",
    "norm_ratio": "its norm over the one before training; the mean of layers",
}
WORD_MEANINGS = {
    "when": "'before' or 'after' training",
    "layer": "the cross-attention layer whose embedding it is; null where all layers read one",
    "rank": "1 is the nearest",
    "word": "a whole word of the tokenizer's vocabulary",
    "cosine": "of its input embedding with the placeholder's",
}


def words_during(log: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of DURING_MEANINGS from the training log; `layers` are the base model's."""
    return [
        {"step": step, "stage": row["stage"], "layer": layer, "rank": rank, "word": word, "cosine": cosine}
        | {"cosine_with_start": read["cosine"], "norm_ratio": read["norm_ratio"]}
        for step, row in enumerate(log)
        if (read := row.get("learned", {}).get("read"))
        for layer, near in zip(layers if len(read["near"]) > 1 else [None], read["near"], strict=True)
        for rank, (word, cosine) in enumerate(near, start=1)
    ]


def plot_words(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """The nearest words over the steps, of the first layer that is there: a line each, as long as it is among them.

    Args:
        rows: of DURING_MEANINGS, at least one.
    """
    mine = [row for row in rows if row["layer"] == rows[0]["layer"]]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in mine:
        lines.setdefault(row["word"], []).append((row["step"], row["cosine"]))
    often = sorted(lines, key=lambda word: (-len(lines[word]), -max(cosine for _, cosine in lines[word])))[:WORDS]
    last = mine[-1]["step"]
    shown = sorted({*often, *(row["word"] for row in mine if row["step"] == last and row["rank"] <= 3)})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.8), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        for index, word in enumerate(shown):
            axes.plot(
                *zip(*lines[word], strict=True), "-o", color=COLOURS[index % len(COLOURS)], ms=4, lw=1.4, label=word
            )
        axes.set_xlabel("step")
        axes.set_ylabel("cosine with the word")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=PALE, lw=0.6)
        axes.margins(x=0.02)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)


def steps(log: Sequence[Mapping[str, Any]], norm_before: float) -> list[dict[str, Any]]:
    """Rows of STEP_MEANINGS from the training log. norm_before: the mean norm before training."""
    return [
        {
            "step": step,
            "stage": row["stage"],
            "cosine": float(row["learned"]["v_cosine"]),
            "norm_ratio": float(row["learned"]["v_norm"]) / norm_before,
        }
        for step, row in enumerate(log)
        if "v_cosine" in row.get("learned", {})
    ]


def plot(methods: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> None:
    """Cosine and norm ratio over the steps, a line for each method; of one alone, dashed lines part its stages.

    Args:
        methods: name -> rows of STEP_MEANINGS, at least one.
    """
    alone = next(iter(methods.values())) if len(methods) == 1 else []
    firsts = {row["stage"]: row["step"] for row in reversed(alone)}  # stage -> its first step
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, column, words in (
            (above, "cosine", "cosine with\nthe start"),
            (below, "norm_ratio", "norm over\nthe start's"),
        ):
            for index, (name, rows) in enumerate(methods.items()):
                line = [row["step"] for row in rows], [row[column] for row in rows]
                axes.plot(*line, color=COLOURS[index % len(COLOURS)], lw=2, label=in_words(name))
            axes.axhline(1, color=GREY, lw=0.8, ls=(0, (5, 4)))
            axes.set_ylabel(words)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=PALE, lw=0.6)
            axes.margins(x=0.01)
            for first in sorted(firsts.values())[1:]:
                axes.axvline(first - 0.5, color=GREY, lw=1, ls=(0, (4, 3)))
        for stage, first in firsts.items() if len(firsts) > 1 else ():
            above.annotate(
                stage.replace("_", " "), (first, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                textcoords="offset points", fontsize=9, color=GREY,
            )  # fmt: skip
        below.set_xlabel("step")
        if len(methods) > 1:
            figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)


def analyse(inputs: Inputs, findings: Findings) -> None:
    before, after = inputs.learned
    layers: list[str | None] = [None] if len(before) == 1 else list(inputs.base.transformers)
    norms = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    findings.metrics["embeddings"] = len(before)
    findings.metrics["cosine with the start"] = float(cosines(before, after).diagonal().mean())
    findings.metrics["norm ratio"] = float((norms[1] / norms[0]).mean())

    words, table = vocabulary(inputs.base)
    near = {when: nearest_words(end, table, words) for when, end in (("before", before), ("after", after))}
    rows = [
        {"when": when, "layer": layer, "rank": rank, "word": word, "cosine": cosine}
        for when, found in near.items()
        for layer, some in zip(layers, found, strict=True)
        for rank, (word, cosine) in enumerate(some, start=1)
    ]
    findings.table("nearest_words.parquet", rows, WORD_MEANINGS, "the nearest words at both ends")
    groups = {
        f"{when} training": dict(found[0])
        if len(found) == 1
        else {f"{layer}: {some[0][0]}": some[0][1] for layer, some in zip(layers, found, strict=True)}
        for when, found in near.items()
    }
    path = findings.image("nearest_words.png", "the words whose input embeddings are nearest to the placeholder's")
    strong = inputs.concept.class_noun.split()[-1]
    shared_plots.bars(groups, path, f"{inputs.concept.placeholder} is near to", "cosine", strong)

    if during := steps(inputs.log, float(norms[0].mean())):
        findings.table("embedding_steps.parquet", during, STEP_MEANINGS, "the embedding after each step")
        path = findings.image("embedding_drift.png", "the embedding's cosine with its start and its norm, step by step")
        plot({inputs.method: during}, path, f"{inputs.concept.placeholder} by {in_words(inputs.method)}")
    else:
        findings.absent["steps"] = (
            "the training log says nothing of the embedding" if inputs.log else "it was not trained here, so no log"
        )
    if words_then := words_during(inputs.log, list(inputs.base.transformers)):
        layer = f", as the layer {words_then[0]['layer']} reads it" if words_then[0]["layer"] else ""
        findings.table(
            "words_during_training.parquet", words_then, DURING_MEANINGS, "the nearest words during training"
        )
        path = findings.image("words_during_training.png", f"the nearest words while it was trained{layer}")
        plot_words(words_then, path, f"{inputs.concept.placeholder} by {in_words(inputs.method)} is near to")
    elif inputs.log:
        findings.absent["nearest words during training"] = (
            "the training log is of before it held them; train again for them"
        )
