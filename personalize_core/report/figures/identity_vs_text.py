"""Variants in a plane: how well each keeps the concept against how well it follows the prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.metrics.tables import ALL_CONCEPTS, BASELINE, CEILING, shown
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.label_placement import is_crowded, place_labels
from personalize_core.report.figures.style import GREY, INK, METRIC_WORDS, PALE, STYLE, save_figure, variant_colours

KEY_WIDTH = 46  # letters of a line of the key
KEY_LINE = 0.19  # inches; the height of one
TITLE_WIDTH = 60  # letters of a title that fit above a plane; the rest stands on the next line


def save_scatter_plot(
    summary: pl.DataFrame,
    path: str | Path,
    title: str,
    concept: str = ALL_CONCEPTS,
    identity: str | None = None,
    text: str = "clip_t",
    labels: Mapping[str, str] | None = None,
    baseline: str = BASELINE,
) -> None:
    """One point per variant: how well it keeps the concept (up) and follows the prompt (right), as PNG and SVG.

    The cross on a point is its 95 % interval; a point without one has a single image. The baseline's identity is
    drawn as a line, that of the real images with each other as the ceiling (which has no prompt, hence no text
    alignment).

    Args:
        summary: what summaries.summarise returned, for one base model.
        path: where the PNG goes; the SVG goes beside it.
        concept: whose rows to take.
        identity, text: which metrics; identity is "dino" by default, or, for a concept without images held out where
            others have some, that with the images trained on.
        labels: variant -> words; by default its display name.

    Raises:
        ValueError: no variant has both metrics, or there are several base models.
    """
    save_figure(scatter_plot(summary, title, concept, identity, text, labels, baseline=baseline), path, also_svg=True)


def scatter_plot(
    summary: pl.DataFrame,
    title: str,
    concept: str = ALL_CONCEPTS,
    identity: str | None = None,
    text: str = "clip_t",
    labels: Mapping[str, str] | None = None,
    size: tuple[float, float] = (7.6, 5.6),
    baseline: str = BASELINE,
) -> Figure:
    """The figure of `save_scatter_plot`, not saved yet; the dotted line is the Pareto front of the means.

    Where variants have different concepts, each says how many, and there is no front: their means do not compare.
    Where names would lie on each other, points have numbers, and the key to them stands below.

    Args:
        title: above it, with a line about what is shown; without a title nothing stands above it.
        size: in inches, at 72 points each; with a key it is as much higher.
    """
    figure, texts = _drawn(summary, title, concept, identity, text, labels, size, baseline, numbered=False)
    if labels is None and is_crowded(figure.axes[0], texts):
        figure, _ = _drawn(summary, title, concept, identity, text, None, size, baseline, numbered=True)
    return figure


def _drawn(
    summary: pl.DataFrame,
    title: str,
    concept: str,
    identity: str | None,
    text: str,
    labels: Mapping[str, str] | None,
    size: tuple[float, float],
    baseline: str,
    numbered: bool,
) -> tuple[Figure, list[Text]]:
    """The figure and its labels."""
    rows = summary.filter(pl.col("concept") == concept).with_columns(pl.col("low", "high").fill_null(pl.col("mean")))
    if rows["base_model"].drop_nulls().n_unique() > 1:
        raise ValueError("the summary holds several base models; plot one figure for each")
    identity = identity or shown("dino", set(rows["metric"]))
    up = {row["variant"]: row for row in rows.filter(metric=identity).iter_rows(named=True)}
    right = {row["variant"]: row for row in rows.filter(metric=text).iter_rows(named=True)}
    variants = [variant for variant in up if variant in right]
    if not variants:
        raise ValueError(f"no variant of {concept!r} has both {identity!r} and {text!r} scores")
    variants.sort(key=lambda variant: (variant != baseline, variant))
    coverage = ConceptCoverage.of_summary(summary, (identity, text))
    gaps = concept == ALL_CONCEPTS and not coverage.whole
    named = {variant: in_words(variant) + (coverage.note(variant) if gaps else "") for variant in variants}
    numbers = {variant: str(number) for number, variant in enumerate(variants, start=1)}
    labels = numbers if numbered else named | dict(labels or {})
    colours = variant_colours(variants, baseline)

    with matplotlib.rc_context(STYLE):
        shown_below = variants if numbered else []
        key = [textwrap.fill(f"{numbers[variant]}  {named[variant]}", KEY_WIDTH) for variant in shown_below]
        lines_of_key = sum(max(words.count("\n") + 1 for words in key[i : i + 2]) for i in range(0, len(key), 2))
        figure = Figure(figsize=(size[0], size[1] + KEY_LINE * lines_of_key), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for variant in variants:
            x, y = right[variant], up[variant]
            axes.plot([x["low"], x["high"]], [y["mean"]] * 2, color=colours[variant], lw=1.4, alpha=0.55, zorder=2)
            axes.plot([x["mean"]] * 2, [y["low"], y["high"]], color=colours[variant], lw=1.4, alpha=0.55, zorder=2)
            axes.plot(x["mean"], y["mean"], "o", color=colours[variant], ms=8, mec="white", mew=1, zorder=3)
        front = pareto_front({variant: (right[variant]["mean"], up[variant]["mean"]) for variant in variants})
        if len(front) > 1 and not gaps:  # what lies below and left of it has a variant that is better in both
            corners = [(right[variant]["mean"], up[variant]["mean"]) for variant in front]
            axes.step(*zip(*corners, strict=True), where="pre", color=GREY, lw=1, ls=(0, (1, 2)), zorder=1)
        xs = [right[v][end] for v in variants for end in ("low", "high")]
        ys = [up[v][end] for v in variants for end in ("low", "high")]
        lines = {}
        if baseline in up:
            about = "nothing learned" if baseline == BASELINE else in_words(baseline)
            lines[f"baseline: {about}"] = up[baseline]["mean"]
        if CEILING in up:
            lines["ceiling: real images with each other"] = up[CEILING]["mean"]
            ys += [up[CEILING]["low"], up[CEILING]["high"]]
            axes.axhspan(up[CEILING]["low"], up[CEILING]["high"], color=GREY, alpha=0.08, lw=0, zorder=0)
        axes.set_xlim(widened(xs, 0.22))
        axes.set_ylim(widened(ys, 0.1))

        written = []
        for words, level in lines.items():
            axes.axhline(level, color=GREY, lw=1, ls=(0, (5, 4)), zorder=1)
            written.append(
                axes.annotate(
                    words, (0, level), xycoords=("axes fraction", "data"), xytext=(6, 3), textcoords="offset points",
                    fontsize=8.5, color=GREY, style="italic",
                )
            )  # fmt: skip
        encoder = {metric: rows.filter(metric=metric)["encoder"][0] for metric in (identity, text)}
        axes.set_xlabel(f"follows the prompt  →   {METRIC_WORDS.get(text, text)}, by {encoder[text]}")
        axes.set_ylabel(f"keeps the concept  →   {METRIC_WORDS.get(identity, identity)}, by {encoder[identity]}")
        above_all = textwrap.fill(title, TITLE_WIDTH)
        axes.set_title(above_all, loc="left", fontsize=13, color=INK, fontweight="bold", pad=22)
        images, concepts = (sorted({up[variant][name] for variant in variants}) for name in ("images", "concepts"))
        about = " to ".join(map(str, dict.fromkeys([images[0], images[-1]]))) + " images a variant"
        if concepts[-1] > 1:
            about += f", {concepts[-1]} concepts"
        if gaps:
            about = "each over the concepts that it has, so points do not compare"
        above = f"mean and 95 % interval; {about}" + ("; dotted: Pareto front" if len(front) > 1 and not gaps else "")
        if title:
            axes.text(0, 1.02, above, transform=axes.transAxes, fontsize=9, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=PALE, lw=0.6, zorder=0)
        axes.set_axisbelow(True)

        points = {labels[v]: (right[v]["mean"], up[v]["mean"]) for v in variants}
        arms = [(right[v]["low"], up[v]["mean"], right[v]["high"], up[v]["mean"]) for v in variants]
        arms += [(right[v]["mean"], up[v]["low"], right[v]["mean"], up[v]["high"]) for v in variants]
        if numbered:
            dots = [Line2D([], [], color=colours[v], ls="", marker="o", ms=6, mec="white") for v in variants]
            figure.legend(dots, key, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        texts = place_labels(figure, axes, points, {labels[v]: colours[v] for v in variants}, arms, written)
    return figure, texts


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other reaches in one coordinate and exceeds in the other, from left to right."""
    return sorted(
        (
            name
            for name, (x, y) in points.items()
            if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
        ),
        key=lambda name: (points[name], name),
    )


def widened(values: Sequence[float], by: float) -> tuple[float, float]:
    """Limits that leave a share `by` of the range free on either side."""
    low, high = min(values), max(values)
    room = (high - low) * by or 0.05
    return low - room, high + room
