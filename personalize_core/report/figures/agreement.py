"""How well each metric predicts what people answered: one row for each metric, a panel for each question."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from personalize_core.report.figures.style import COLOURS, GREY, INK, METRIC_WORDS, PALE, STYLE

RATERS = "another rater"  # in the place of a metric: how well raters predict each other
ASKED = {"text": "which fits the text", "image": "which looks like the concept", "both": "both at once"}


def agreement_plot(found: pl.DataFrame) -> Figure:
    """Share of answers that each metric predicts, with 95 % intervals; the dashed line is one rater by another.

    found: what `study.metric_agreement.agreement` returned.
    """
    questions = found["question"].unique(maintain_order=True).to_list()
    metrics = found.filter(pl.col("metric") != RATERS)
    ways = metrics.select("metric", "encoder").unique(maintain_order=True).rows()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.9 + len(questions) * (0.9 + 0.26 * len(ways))), dpi=150, layout="constrained")
        panels = figure.subplots(len(questions), squeeze=False)[:, 0]
        for axes, question in zip(panels, questions, strict=True):
            own = {(r["metric"], r["encoder"]): r for r in metrics.filter(question=question).iter_rows(named=True)}
            for place, way in enumerate(ways):
                if not (row := own.get(way)) or row["accuracy"] is None:
                    continue
                colour = COLOURS[0] if row["headline"] else GREY
                if row["accuracy_low"] is not None:
                    ends = [row["accuracy_low"], row["accuracy_high"]]
                    axes.plot(ends, [place, place], color=colour, lw=1.6, alpha=0.6, zorder=2)
                axes.plot(row["accuracy"], place, "o", color=colour, ms=6, mec="white", mew=0.8, zorder=3)
            axes.axvline(0.5, color=GREY, lw=1, ls=(0, (1, 2)), zorder=1)
            raters = found.filter(question=question, metric=RATERS)["accuracy"].drop_nulls().to_list()
            if raters:
                axes.axvline(raters[0], color=INK, lw=1, ls=(0, (5, 4)), zorder=1)
            axes.set_yticks(range(len(ways)), [f"{METRIC_WORDS.get(m, m.replace('_', ' '))}, {e}" for m, e in ways])
            axes.set_ylim(len(ways) - 0.4, -0.6)
            axes.set_xlim(-0.02, 1.02)
            axes.set_title(f"{ASKED.get(question, question)}", loc="left", fontsize=10.5, color=INK)
            axes.grid(color=PALE, lw=0.6, axis="x", zorder=0)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("share of answers predicted; dotted: chance, dashed: one rater by another")
    return figure
