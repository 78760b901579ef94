"""Plots that several analyses share: dots in rows, a table of shaded values, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from personalize_core.metrics.tables import BASELINE
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.style import COLOURS, GREY, INK, PALE, STYLE, save_figure

MOST_ROWS = 60  # of a figure: it stays legible
MOST_LABEL = 60  # characters of a row's label; a prompt from outside may have thousands


@dataclass(frozen=True)
class Panel:
    """Dots in rows: each series has for each row a few values, or none."""

    label: str  # of the axis
    series: Mapping[str, Sequence[Sequence[float]]]  # name -> a list of values for each row
    lines: Mapping[str, float] = field(default_factory=dict)  # words -> a value that holds for all rows


def dots(panels: Sequence[Panel], rows: Sequence[str], path: Path, title: str, note: str = "") -> None:
    """Panels side by side that share their rows; several values in a row are pale dots with their mean beside.

    A series called as the base model is grey; lines cross all rows. Of many rows the first are shown, and
    the title says so.
    """
    if len(rows) > MOST_ROWS:
        title, rows = f"{title} (the first {MOST_ROWS} of {len(rows)} prompts)", rows[:MOST_ROWS]
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    others = [name for name in names if name != BASELINE]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)} | {BASELINE: GREY}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 3.6 * len(panels), 1.9 + 0.42 * len(rows)), dpi=130, layout="constrained")
        axes_of_panels = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(axes_of_panels, panels, strict=True):
            for place, (name, values) in enumerate(panel.series.items()):
                up = (place - (len(panel.series) - 1) / 2) * 0.22
                for row, some in enumerate(values[: len(rows)]):
                    if len(some) > 1:
                        axes.plot(some, [row + up] * len(some), "o", color=colours[name], ms=3.5, alpha=0.35, zorder=2)
                    if len(some):
                        mean = float(np.mean(some))
                        axes.plot(mean, row + up, "o", color=colours[name], ms=7, mec="white", mew=0.8, zorder=3)
                axes.plot([], [], "o", color=colours[name], label=in_words(name))
            for index, (words, level) in enumerate(panel.lines.items()):
                axes.axvline(level, color=INK, lw=1, ls=[(0, (5, 4)), (0, (1, 2))][index % 2], label=words)
            axes.set_xlabel(panel.label)
            axes.set_yticks(range(len(rows)), [_cut(row) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.grid(color=PALE, lw=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.margins(x=0.08)
        handles = {}
        for axes in axes_of_panels:
            found = axes.get_legend_handles_labels()
            handles |= dict(zip(found[1], found[0], strict=True))
        where: Any = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 9}
        figure.legend(list(handles.values()), list(handles), title=note or None, title_fontsize=8.5, **where)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)


def _cut(label: str) -> str:
    return label if len(label) <= MOST_LABEL else f"{label[: MOST_LABEL - 1].rstrip()}…"


def shaded(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: Path, title: str, label: str) -> None:
    """A table of values, each cell the darker the higher it is.

    Args:
        values: (rows, columns), at most 1; shades reach from the least of them to 1.
        label: what the values are.
    """
    low = float(min(values.min(), 0.99))
    with matplotlib.rc_context(STYLE):
        size = (2.8 + 0.95 * len(columns), 1.5 + 0.42 * len(rows))
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(values, vmin=low, vmax=1, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = (value - low) / (1 - low) > 0.6
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=9, color="white" if dark else INK)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, labelcolor=INK)
        axes.xaxis.tick_top()
        axes.spines[:].set_visible(False)
        axes.set_xlabel(label, fontsize=9, color=GREY)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)


def bars(groups: Mapping[str, Mapping[str, float]], path: Path, title: str, label: str, strong: str = "") -> None:
    """Groups side by side, each its words with a number as a bar; the word `strong` in another colour."""
    most = max(len(words) for words in groups.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(groups), 1.3 + 0.32 * most), dpi=130, layout="constrained")
        low = min(0.0, *(value for words in groups.values() for value in words.values()))
        for axes, (heading, words) in zip(
            figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
        ):
            colours = [COLOURS[1] if word == strong else COLOURS[0] for word in words]
            axes.barh(range(len(words)), list(words.values()), color=colours, height=0.68)
            for row, value in enumerate(words.values()):
                axes.annotate(
                    f"{value:.3f}", (max(value, 0), row), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8.5, color=GREY,
                )  # fmt: skip
            axes.set_yticks(range(len(words)), list(words))
            axes.set_ylim(most - 0.4, -0.6)
            axes.set_xlim(low, 1.18 * max(max(words.values()), 0.05))
            axes.set_title(heading, loc="left", fontsize=10, color=INK)
            axes.set_xlabel(label, fontsize=9)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)
