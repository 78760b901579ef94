"""Losses over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from personalize_core.report.figures.style import COLOURS, GREY, INK, PALE, STYLE, save_figure

NO_LOSS = ("stage", "step", "gradient_norm", "lr", "learned", "seconds", "fixed_inputs")
FIXED = "loss on fixed inputs"
Log = Sequence[Mapping[str, Any]]  # a row a step: "stage", "step", each loss by name
Seen = Sequence[
    Mapping[str, Any]
]  # the loss on fixed inputs: "stage", "step" (how many of its steps were done), "value"


def loss_curve(
    log_rows: Iterable[Mapping[str, Any]], path: str | Path, title: str = "", fixed_inputs: Seen = ()
) -> None:
    """Each loss over all steps, faint as logged and strong as its moving average; stages side by side.

    The loss on fixed inputs, which has no noise to average away, is shown as it was taken.

    Args:
        log_rows: the training log, one mapping a step: "stage", "step", each loss by name, and "gradient_norm",
            which gets a panel of its own; "lr" and "learned" are not plotted.
        path: where the PNG goes.
        fixed_inputs: what was seen before the first step of each stage, and behind some others; the log has no row
            for the former.

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
            everything += plot_series(losses, rows, name, colour, f"{name.replace('_', ' ')} loss")
        for number, (xs, values) in enumerate(seen_by_stage(rows, fixed_inputs)):
            losses.plot(xs, values, color=INK, lw=1.2, marker="o", ms=3, label=None if number else FIXED)
            everything += values
        if min(everything) > 0 and max(everything) > 30 * min(everything):
            losses.set_yscale("log")
            losses.yaxis.set_major_formatter("{x:g}")  # matplotlib's own writes formulas, which are not parsed
        losses.set_ylabel("loss")
        figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=3)
        if norms:
            plot_series(panels[1, 0], rows, "gradient_norm", GREY, "")
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


def plot_series(axes: Axes, rows: Log, name: str, colour: str, label: str) -> list[float]:
    """One metric of the log, averaged within each stage; returns the averages."""
    averages: list[float] = []
    for steps, values, smooth in averaged(rows, name):
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=colour, lw=2, label=label if not averages else None)
        averages += smooth.tolist()
    return averages


def averaged(rows: Log, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each stage that has this metric: the rows that do, its values, and their moving average within the stage."""
    for stage in dict.fromkeys(str(row["stage"]) for row in rows):
        steps = [i for i, row in enumerate(rows) if str(row["stage"]) == stage and row.get(name) is not None]
        values = np.array([rows[i][name] for i in steps], dtype=float)
        if len(values):
            yield np.array(steps), values, moving_average(values, max(1, len(values) // 30))


def seen_by_stage(rows: Log, fixed_inputs: Seen) -> Iterator[tuple[list[int], list[float]]]:
    """Of each stage, whose inputs are its own: where its values stand among the rows, and the values."""
    for stage in dict.fromkeys(one["stage"] for one in fixed_inputs):
        own = [one for one in fixed_inputs if one["stage"] == stage]
        start = next(i for i, row in enumerate(rows) if row["stage"] == stage)
        # row i has the loss of what i steps have left, and so has a value taken behind them
        yield [start + one["step"] for one in own], [one["value"] for one in own]


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and the `reach` values on either side; of as many as there are near the ends."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
