"""Embedding drift: how far the placeholder's embedding went, and which words it is near (methods.md 15.2).

AttnDreamBooth (Pang et al. 2024): tuned together with the U-Net it hardly moves, tuned alone it moves far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from personalize_core.analyses import plots
from personalize_core.analyses.bench import Bench
from personalize_core.analyses.results import NotDefined, Results
from personalize_core.base import LAYERS, BaseModel, hooked
from personalize_core.figures import COLOURS, GREY, INK, PALE, STYLE, save_figure
from personalize_core.method import Method
from personalize_core.names import in_words

TITLE = "Embedding drift"
LOOKS = 20  # during a training
HOW = (
    "What the text encoder reads in the placeholder's place, before and after training: the cosine of the two, the "
    "ratio of their norms, and the nearest whole words of the vocabulary by the cosine of input embeddings. The log of "
    f"the training holds the words too, at {LOOKS} places, or at every step of a shorter one."
)
MIDDLE = 500  # of the 1000 timesteps, for an embedding that differs between them
WORDS = 8
TOLERANCE = 1e-4  # relative; what is read is known to rounding
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


@torch.no_grad()
def what_is_read(method: Method, base: BaseModel, t: int = MIDDLE) -> Tensor:
    """The input embeddings that the text encoder reads for the placeholder alone, at timestep t: (n, D) on the CPU.

    n is 1, or 16 where each cross-attention layer has its own. Whatever a method does to the text encoder's input
    shows here, so none is asked for by name. Known to rounding, since position embeddings are taken off again.

    Raises:
        NotDefined: the method says no placeholder.
    """
    if not speaks_of_it(method):
        raise NotDefined("the method speaks of the concept by its class noun alone, so there is no placeholder to read")
    with method.attach(base):
        return _read_attached(method, base, t)


def speaks_of_it(method: Method) -> bool:
    """Is there a placeholder in what the method says?"""
    return method.concept.placeholder in method.phrase


@torch.no_grad()
def _read_attached(method: Method, base: BaseModel, t: int = MIDDLE) -> Tensor:
    """`what_is_read` of a method that is attached already."""
    prompt, seen = [method.concept.placeholder], []
    place = int(base.tokenizer(prompt, method.concept).placeholder[0].int().argmax())
    modules: dict[str, Any] = dict(base.text_encoder.named_modules())
    embeddings = next(modules[name] for name in modules if name.rpartition(".")[2] == "embeddings")
    position = embeddings.position_embedding.weight[place]

    def look(module: Any, args: Any, answer: Tensor) -> None:
        seen.append(answer[:, place] - position)

    with hooked(embeddings.register_forward_hook(look)):
        method.condition(base, prompt)(torch.full((1,), t, device=base.device))
    return seen[-1].float().cpu()


def both_ends(start: Method, trained: Method, base: BaseModel) -> tuple[np.ndarray, np.ndarray]:
    """`what_is_read` before and after training, both (n, D) float64, row for row.

    Raises:
        NotDefined: training changed nothing there.
    """
    before, after = (what_is_read(method, base).double().numpy() for method in (start, trained))
    if np.allclose(before, after, rtol=0, atol=TOLERANCE * float(np.abs(before).max())):
        raise NotDefined(
            "the method learns no embedding: what the text encoder reads for the placeholder is the same before and "
            "after training"
        )
    return before, after


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, M) of rows (N, D) with rows (M, D), of any norm but 0."""
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return np.clip(one @ other.T, -1, 1)


def vocabulary(base: BaseModel) -> tuple[list[str], np.ndarray]:
    """Its whole words of plain letters, and their input embeddings, (V, D) float64; without those that are all 0."""
    words, ids = whole_words(base)
    return words, base.text_encoder.get_input_embeddings().weight.detach()[ids].double().cpu().numpy()


def whole_words(base: BaseModel) -> tuple[list[str], list[int]]:
    """The same words, and their places in the table of input embeddings."""
    # The tokenizer's own dictionary, which PromptTokenizer keeps to itself: every other door leads from word to id.
    ids: dict[str, int] = base.tokenizer._tokenizer.get_vocab()
    there = base.text_encoder.get_input_embeddings().weight.detach().any(dim=1).tolist()
    found = {token.removesuffix("</w>"): i for token, i in ids.items() if token.endswith("</w>") and i < len(there)}
    words = [word for word in sorted(found) if word.isascii() and word.isalpha() and there[found[word]]]
    return words, [found[word] for word in words]


def nearest_words(
    vectors: np.ndarray, table: np.ndarray, words: Sequence[str], count: int = WORDS
) -> list[list[tuple[str, float]]]:
    """For each row of `vectors`, (n, D), the words whose rows of `table`, (V, D), have the greatest cosine."""
    alike = cosines(vectors, table)
    order: list[list[int]] = np.argsort(-alike, axis=1, kind="stable")[:, :count].tolist()
    return [[(words[j], float(alike[i, j])) for j in row] for i, row in enumerate(order)]


@contextmanager
def _still(method: Method) -> Iterator[None]:
    """Within it the method is as when it draws: nothing is dropped out, and no random number taken."""
    learning = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(learning)


class WhileTraining:
    """Looks at what is read for the placeholder while a method learns; it changes nothing of the training.

    What the vocabulary takes stays where it is, so that a look costs no memory to speak of.
    """

    def __init__(self, method: Method, base: BaseModel, total: int) -> None:
        """method: as its training starts, on the base model's device and not attached. total: steps of all stages."""
        self.method, self.base, self.total = method, base, total
        self.every = max(1, -(-total // LOOKS))
        self.start: Tensor | None = None
        if speaks_of_it(method):
            with method.attach(base), _still(method):
                self.start = _read_attached(method, base)
        self.words: list[str] = []
        self.norms = self.ids = torch.empty(0)

    def __call__(self, done: int) -> dict[str, Any] | None:
        """For the log after `done` steps of the whole training, of a method that is attached.

        Returns:
            the mean "cosine" with the start and the mean "norm_ratio", and "near", for each embedding its nearest
            words with their cosines. None between looks, and where what is read is still the same as before.
        """
        if self.start is None or (done % self.every and done != self.total):
            return None
        with _still(self.method):
            read = _read_attached(self.method, self.base)
        if torch.allclose(read, self.start, rtol=0, atol=TOLERANCE * float(self.start.abs().max())):
            return None
        return {
            "cosine": float(torch.cosine_similarity(read, self.start).mean()),
            "norm_ratio": float((read.norm(dim=1) / self.start.norm(dim=1)).mean()),
            "near": self._near(read),
        }

    @torch.no_grad()
    def _near(self, read: Tensor) -> list[list[tuple[str, float]]]:
        table = self.base.text_encoder.get_input_embeddings().weight
        if not self.words:
            self.words, ids = whole_words(self.base)
            self.ids, self.norms = torch.tensor(ids), table.float().norm(dim=1).cpu()[ids]
        rows = (read / read.norm(dim=1, keepdim=True)).to(table)
        alike = (table @ rows.T).float().cpu()[self.ids] / self.norms[:, None]  # (words, n)
        best = alike.topk(min(WORDS, len(self.words)), dim=0)
        return [
            [(self.words[place], round(value, 6)) for place, value in zip(*pair, strict=True)]
            for pair in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
        ]


def words_during(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of DURING_MEANINGS from the training log."""
    return [
        {"step": step, "stage": row["stage"], "layer": layer, "rank": rank, "word": word, "cosine": cosine}
        | {"cosine_with_start": read["cosine"], "norm_ratio": read["norm_ratio"]}
        for step, row in enumerate(log)
        if (read := row.get("learned", {}).get("read"))
        for layer, near in zip(LAYERS if len(read["near"]) > 1 else [None], read["near"], strict=True)
        for rank, (word, cosine) in enumerate(near, start=1)
    ]


def draw_words(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
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


def draw(methods: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> None:
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


def analyse(bench: Bench, into: Results) -> None:
    before, after = bench.learned
    layers: list[str | None] = [None] if len(before) == 1 else list(LAYERS)
    norms = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    into.numbers["embeddings"] = len(before)
    into.numbers["cosine with the start"] = float(cosines(before, after).diagonal().mean())
    into.numbers["norm ratio"] = float((norms[1] / norms[0]).mean())

    words, table = vocabulary(bench.base)
    near = {when: nearest_words(end, table, words) for when, end in (("before", before), ("after", after))}
    rows = [
        {"when": when, "layer": layer, "rank": rank, "word": word, "cosine": cosine}
        for when, found in near.items()
        for layer, some in zip(layers, found, strict=True)
        for rank, (word, cosine) in enumerate(some, start=1)
    ]
    into.table("nearest_words.parquet", rows, WORD_MEANINGS, "the nearest words at both ends")
    groups = {
        f"{when} training": dict(found[0])
        if len(found) == 1
        else {f"{layer}: {some[0][0]}": some[0][1] for layer, some in zip(layers, found, strict=True)}
        for when, found in near.items()
    }
    path = into.picture("nearest_words.png", "the words whose input embeddings are nearest to the placeholder's")
    strong = bench.concept.class_noun.split()[-1]
    plots.bars(groups, path, f"{bench.concept.placeholder} is near to", "cosine", strong)

    if during := steps(bench.log, float(norms[0].mean())):
        into.table("embedding_steps.parquet", during, STEP_MEANINGS, "the embedding after each step")
        path = into.picture("embedding_drift.png", "the embedding's cosine with its start and its norm, step by step")
        draw({bench.method: during}, path, f"{bench.concept.placeholder} by {in_words(bench.method)}")
    else:
        into.absent["steps"] = (
            "the training log says nothing of the embedding" if bench.log else "it was not trained here, so no log"
        )
    if words_then := words_during(bench.log):
        layer = f", as the layer {words_then[0]['layer']} reads it" if words_then[0]["layer"] else ""
        into.table("words_during_training.parquet", words_then, DURING_MEANINGS, "the nearest words during training")
        path = into.picture("words_during_training.png", f"the nearest words while it was trained{layer}")
        draw_words(words_then, path, f"{bench.concept.placeholder} by {in_words(bench.method)} is near to")
    elif bench.log:
        into.absent["nearest words during training"] = (
            "the training log is of before it held them; train again for them"
        )
