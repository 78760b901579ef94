"""What was seen of a training: curves of the loss on fixed inputs and of the probes' metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from personalize_core.report.figures.style import COLOURS, GREY, PALE, STYLE, save_figure

PANELS = {
    "loss": "loss on\nfixed inputs",
    "identity": "identity",
    "text": "text\nalignment",
    "balance": "balance",
    "copying": "nearest\ntrained on",
    "drift": "drift",
}


def probe_curves(table: pl.DataFrame, stages: Mapping[str, int], path: str | Path) -> None:
    """A panel for each metric that was taken: its mean over images, of the loss the sum over its inputs; and a band of
    one standard error.

    The error is that of the change since the first look, for inputs and prompts differ far more than what changes.

    Args:
        table: "stage", "done", "metric", "row", "value".
        stages: name -> how many steps came before it.
    """
    shown = [metric for metric in PANELS if (table["metric"] == metric).any()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.2 + 1.35 * len(shown)), dpi=130, layout="constrained")
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, metric, colour in zip(panels, shown, COLOURS, strict=False):
            found = _with_bands(table.filter(pl.col("metric") == metric), of_all=metric == "loss")
            x, mean, error = (found[name].to_numpy() for name in ("done", "value", "error"))
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
            axes.plot(x, mean, color=colour, lw=1.8, marker="o", ms=3)
            axes.set_ylabel(PANELS[metric], fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=PALE, lw=0.6)
            axes.margins(x=0.01)
            for start in list(stages.values())[1:]:
                axes.axvline(start, color=GREY, lw=1, ls=(0, (4, 3)))
        if len(stages) > 1:
            for name, start in stages.items():
                panels[0].annotate(
                    name.replace("_", " "), (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                    textcoords="offset points", fontsize=9, color=GREY,
                )  # fmt: skip
        panels[-1].set_xlabel("step")
        save_figure(figure, path)


def _with_bands(rows: pl.DataFrame, of_all: bool) -> pl.DataFrame:
    """For each moment "done", "value" and "error": of the rows' sum, or of their mean.

    The error is what the rows' changes since their first values say.
    """
    first = pl.col("value").sort_by("done").first().over("stage", "row")
    times = pl.len() if of_all else pl.lit(1)
    return (
        rows.with_columns(change=pl.col("value") - first)
        .group_by("stage", "done", maintain_order=True)
        .agg(
            value=pl.col("value").mean() * times,
            error=(pl.col("change").std(ddof=1) / pl.len().sqrt() * times).fill_null(0.0),
        )
        .sort("done")
    )
