"""Losses over the steps of a training: a plot, and a line small enough for a table's cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from personalize_core.report.figures.style import COLOURS, GREY, INK, PALE, STYLE, save_figure

NO_LOSS = ("stage", "step", "gradient_norm", "lr", "learned", "seconds")


def loss_curve(log_rows: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Each loss over all steps, faint as logged and strong as its moving average; stages side by side.

    Args:
        log_rows: the training log, one mapping a step: "stage", "step", each loss by name, and "gradient_norm",
            which gets a panel of its own; "lr" and "learned" are not plotted.
        path: where the PNG goes.

    Raises:
        ValueError: nothing was logged.
    """
    rows = list(log_rows)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NO_LOSS))
    if not names:
        raise ValueError("no losses were logged, so there is no curve to plot")
    stages = list(dict.fromkeys(str(row["stage"]) for row in rows))
    starts = {stage: next(i for i, row in enumerate(rows) if str(row["stage"]) == stage) for stage in stages}
    norms = any("gradient_norm" in row for row in rows)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.8 if norms else 3.8), dpi=130, layout="constrained")
        panels = figure.subplots(2 if norms else 1, sharex=True, squeeze=False, height_ratios=[3, 1] if norms else [1])
        losses, everything = panels[0, 0], []
        for index, name in enumerate(names):
            colour = COLOURS[index % len(COLOURS)]
            everything += plot_series(losses, rows, stages, name, colour, f"{name.replace('_', ' ')} loss")
        if min(everything) > 0 and max(everything) > 30 * min(everything):
            losses.set_yscale("log")
            losses.yaxis.set_major_formatter("{x:g}")  # matplotlib's own writes formulas, which are not parsed
        losses.set_ylabel("loss")
        losses.legend(frameon=False, fontsize=9, loc="upper right", ncols=min(len(names), 3))
        if norms:
            plot_series(panels[1, 0], rows, stages, "gradient_norm", GREY, "")
            panels[1, 0].set_ylabel("gradient\nnorm")
        for axes in panels[:, 0]:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=PALE, lw=0.6)
            axes.margins(x=0.01)
            for stage in stages[1:]:
                axes.axvline(starts[stage] - 0.5, color=GREY, lw=1, ls=(0, (4, 3)))
        if len(stages) > 1:
            for stage in stages:
                losses.annotate(
                    stage.replace("_", " "), (starts[stage], 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                    textcoords="offset points", fontsize=9, color=GREY,
                )  # fmt: skip
        panels[-1, 0].set_xlabel("step")
        if title:
            losses.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold", pad=18)
        save_figure(figure, path)


def plot_series(
    axes: Axes, rows: Sequence[Mapping[str, Any]], stages: Sequence[str], name: str, colour: str, label: str
) -> list[float]:
    """One metric of the log, averaged within each stage; returns the averages."""
    averages: list[float] = []
    for stage in stages:
        steps = [i for i, row in enumerate(rows) if str(row["stage"]) == stage and row.get(name) is not None]
        values = np.array([rows[i][name] for i in steps], dtype=float)
        if not len(values):
            continue
        smooth = moving_average(values, max(1, len(values) // 30))
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=colour, lw=2, label=label if not averages else None)
        averages += smooth.tolist()
    return averages


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and the `reach` values on either side; of as many as there are near the ends."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
