"""The trials of a search over what they took, with the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from personalize_core.report.display_names import in_words
from personalize_core.report.figures.style import COLOURS, GREY, INK, PALE, STYLE, save_figure
from personalize_core.tuning.search import COMPLETE, DIVERGED, PRUNED, Trial


def save_plot(trials: Sequence[Trial], best: Trial, noise: float | None, method: str, path: Path) -> None:
    """Each trial's balance where it ended, against the device's minutes that had passed by then.

    Args:
        noise: standard deviation that another training seed gives a trial's mean; None: not measured.
    """
    ends = [seconds / 60 for seconds in accumulate(trial.seconds.all for trial in trials)]
    complete = [(end, trial) for end, trial in zip(ends, trials, strict=True) if trial.state == COMPLETE]
    early = {
        state: [end for end, trial in zip(ends, trials, strict=True) if trial.state == state]
        for state in (PRUNED, DIVERGED)
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2), dpi=130, layout="constrained")
        axes = figure.subplots()
        record = list(accumulate((trial.reached for _, trial in complete), max))
        axes.step(
            [*(end for end, _ in complete), ends[-1]], [*record, record[-1]], where="post", color=COLOURS[0], lw=1.5,
            label="best so far",
        )  # fmt: skip
        axes.errorbar(
            [end for end, _ in complete], [trial.reached for _, trial in complete], yerr=noise, fmt="o", ms=5,
            color=COLOURS[0], ecolor=GREY, elinewidth=1, capsize=2,
            label="trial" + (", ± noise of training" if noise is not None else ""),
        )  # fmt: skip
        for (state, places), marker in zip(early.items(), "|x", strict=True):
            if places:  # on the axis: a mean over some of the concepts is at no place beside the others
                axes.plot(
                    places, [0.03] * len(places), marker, ms=8, color=GREY, label=state, ls="none",
                    transform=axes.get_xaxis_transform(),
                )  # fmt: skip
        axes.plot(ends[0], trials[0].reached, "D", ms=8, color=COLOURS[1], zorder=3, label="today's recipe")
        axes.axhline(trials[0].reached, color=COLOURS[1], lw=1, ls=(0, (4, 3)))
        if best.number:
            axes.plot(ends[best.number], best.reached, "*", ms=15, color=COLOURS[2], zorder=3, label="best trial")
        axes.set_xlabel("minutes of the device")
        axes.set_ylabel("balance on the tuning concepts")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=PALE, lw=0.6)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
        axes.set_title(f"Tuning {in_words(method)}", loc="left", fontsize=12, color=INK, fontweight="bold")
        save_figure(figure, path)
