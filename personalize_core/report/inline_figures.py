"""The report's figures: rendered once as PNG and SVG, and the SVG placed inline in the page, in its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from personalize_core.metrics.tables import ALL_CONCEPTS, shown
from personalize_core.report.display_names import in_words
from personalize_core.report.evidence import Evidence, Learned
from personalize_core.report.figures.agreement import agreement_plot
from personalize_core.report.figures.identity_vs_text import scatter_plot
from personalize_core.report.figures.losses import FIXED, NO_LOSS, averaged, seen_by_stage
from personalize_core.report.figures.style import COLOURS, GREY, INK, NO_METADATA, PALE, STYLE

# What the page's style sheet gives other values in the dark.
THEMED = {INK: "ink", GREY: "quiet", PALE: "line", "#ffffff": "card"} | {
    colour: f"series-{number}" for number, colour in enumerate(COLOURS)
}
MOST_POINTS = 240  # of one line; more cannot be seen
STYLED = {**STYLE, "font.size": 10}


@dataclass(frozen=True)
class InlineFigure:
    """A figure, ready for the page and for files."""

    name: str  # of its files
    alt: str  # what it shows, for those who do not see it
    svg: bytes
    png: bytes

    def inline(self) -> Markup:
        """The SVG as part of a page: as wide as there is room, its ids its own."""
        text = self.svg.decode()
        text = text[text.index("<svg") :]
        opening, inside = text.split(">", 1)
        box = re.search(r'viewBox="[^"]*"', opening)
        assert box  # matplotlib always writes one
        opening = f'<svg {box[0]} role="img" aria-label="{escape(self.alt)}"'
        inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
        inside = re.sub(r'\bid="', f'id="{self.name}-', inside)
        inside = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{self.name}-", inside)
        for colour, name in THEMED.items():
            inside = inside.replace(colour, f"var(--{name})")
        return Markup(opening + ">" + inside)


def every(evidence: Evidence) -> dict[str, InlineFigure]:
    """The plane over all concepts and of each, and the losses of each method that was trained."""
    made = []
    if _in_the_plane(evidence):
        made.append(_plane(evidence, "identity_vs_text", ALL_CONCEPTS))
        if len(evidence.concepts) > 1:
            names = [concept.name for concept in evidence.concepts]
            made += [_plane(evidence, f"identity_vs_text_{name}", name) for name in names]
    if evidence.agreement is not None:
        alt = "Share of people's answers that each score predicts; the table beside it has the numbers."
        made.append(rendered(agreement_plot(evidence.agreement), "agreement", alt))
    made += [_losses(method.name, method.learned) for method in evidence.methods if method.trained]
    return {one.name: one for one in made}


def narrow(evidence: Evidence) -> tuple[InlineFigure, dict[str, str]] | None:
    """The plane over all concepts for a narrow screen: its points are numbered, and the key is returned with it."""
    if not (variants := _in_the_plane(evidence)):
        return None
    numbers = {variant: str(number) for number, variant in enumerate(variants, start=1)}
    figure = scatter_plot(evidence.summary, "", labels=numbers, size=(4.4, 5.0), baseline=evidence.baseline)
    return rendered(figure, "identity_vs_text_narrow", _said(evidence, ALL_CONCEPTS)), numbers


def rendered(figure: Figure, name: str, alt: str) -> InlineFigure:
    content = {}
    with matplotlib.rc_context(STYLED):  # else an SVG's ids are random
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=NO_METADATA[kind], facecolor="white")
            content[kind] = buffer.getvalue()
    return InlineFigure(name.replace("@", "-"), alt, **content)


def _in_the_plane(evidence: Evidence) -> list[str]:
    """The variants that have both scores, as the figure orders them."""
    both = [set(evidence.overall(metric)) for metric in (evidence.identity, "clip_t")]
    return [variant for variant in evidence.variants if all(variant in of for of in both)]


def _plane(evidence: Evidence, name: str, concept: str) -> InlineFigure:
    names = [one.name for one in evidence.concepts]
    several = concept == ALL_CONCEPTS and len(names) > 1
    over = f"{len(names)} concepts" if evidence.coverage.whole else f"the concepts that each has, of {len(names)}"
    about = f"mean over {over}" if several else names[0] if concept == ALL_CONCEPTS else concept
    figure = scatter_plot(evidence.summary, f"Identity against text, {about}", concept, baseline=evidence.baseline)
    return rendered(figure, name, _said(evidence, concept))


def _said(evidence: Evidence, concept: str) -> str:
    """The plane's points in words."""
    rows = evidence.summary.filter(concept=concept)
    means = {(row["variant"], row["metric"]): row["mean"] for row in rows.iter_rows(named=True)}
    identity = shown("dino", set(rows["metric"]))
    coverage = {v: evidence.coverage.note(v) if concept == ALL_CONCEPTS else "" for v in evidence.variants}
    points = [
        f"{in_words(variant)}{coverage[variant]} {means[variant, 'clip_t']:.3f}, {means[variant, identity]:.3f}"
        for variant in evidence.variants
        if (variant, "clip_t") in means and (variant, identity) in means
    ]
    return f"Text alignment (CLIP-T) and identity (DINO) of {concept}: {'; '.join(points)}."


def _losses(method: str, learned: Sequence[Learned]) -> InlineFigure:
    """A panel for each loss, a line for each concept, as moving averages; the loss on fixed inputs as it was taken."""
    logs = {one.concept: one.log for one in learned if one.log}
    seen = {one.concept: fixed for one in learned if (fixed := _on_fixed_inputs(one))}
    names = list(dict.fromkeys(name for log in logs.values() for row in log for name in row if name not in NO_LOSS))
    with matplotlib.rc_context(STYLED):
        count = len(names) + bool(seen)
        figure = Figure(figsize=(7.6, 0.7 + 1.9 * count), dpi=150, layout="constrained")
        panels = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
        for number, (concept, log) in enumerate(logs.items()):
            colour = COLOURS[number % len(COLOURS)]
            for axes, name in zip(panels, names, strict=False):
                axes.set_ylabel(f"{name.replace('_', ' ')} loss")
                for piece, (steps, values) in enumerate(_lines(log, name)):
                    axes.plot(steps, values, color=colour, lw=1.6, label=None if piece else concept)
            for steps, values in seen_by_stage(log, seen.get(concept, [])):
                panels[-1].plot(steps, values, color=colour, lw=1.2, marker="o", ms=3)
        if seen:
            panels[-1].set_ylabel(FIXED.replace(" on ", " on\n"))
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=PALE, lw=0.6)
            axes.margins(x=0.01)
            for start, stage in _stages(next(iter(logs.values()))):
                axes.axvline(start, color=GREY, lw=1, ls=(0, (4, 3)))
                if axes is panels[0]:
                    axes.annotate(
                        stage.replace("_", " "), (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                        textcoords="offset points", fontsize=9, color=GREY,
                    )  # fmt: skip
        panels[-1].set_xlabel("training step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    concepts = ", ".join(logs)
    return rendered(figure, f"losses_{method}", f"Losses of {in_words(method)} while it learned {concepts}.")


def _lines(log: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each stage: where a loss was logged and its moving average, thinned."""
    for steps, _, smooth in averaged(log, name):
        most = max(2, MOST_POINTS * len(steps) // len(log))
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int))
        yield steps[kept], smooth[kept]


def _on_fixed_inputs(learned: Learned) -> list[dict[str, Any]]:
    """As `losses.Seen`; nothing where the training was not watched."""
    if learned.probes is None or not learned.log:
        return []
    losses = learned.probes.filter(metric="loss").group_by("stage", "step", maintain_order=True)
    return losses.agg(pl.col("value").sum()).to_dicts()


def _stages(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Where each stage begins; nothing for a single one."""
    names = [str(row["stage"]) for row in log]
    starts = [index for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    return [(start, names[start]) for start in starts] if len(starts) > 1 else []
