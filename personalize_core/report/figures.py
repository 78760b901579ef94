"""Images for people: grids of images, scores in a plane, loss curves, and small versions for a user interface.

Equal input gives equal bytes (no date, no version is written), and a file is whole or not there.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont, ImageOps

from personalize_core.files.atomic import write_bytes
from personalize_core.metrics.concept_counts import Coverage
from personalize_core.metrics.tables import ALL_CONCEPTS, BASELINE, CEILING
from personalize_core.report.display_names import in_words

ImageSource = Image.Image | str | Path

INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#e4e4e4"
# Okabe & Ito 2008: told apart by colour-blind readers; the yellow is left out, too pale for text on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a4fb5", "#56b4e9", "#b8860b", "#8c3b3b", "#4d4d4d", "#5f8f00")
TITLE_WIDTH = 60  # letters of a title that fit above a plane; the rest stands on the next line
METRIC_WORDS = {"clip_t": "CLIP-T", "clip_t_scaled": "CLIPScore", "clip_i": "CLIP-I", "dino": "DINO score"}
NO_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "personalize",  # else the ids in an SVG are random
    "svg.fonttype": "path",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


# -- grids of images ----------------------------------------------------------------------------------------


def comparison_grid(
    references: Sequence[ImageSource],
    rows: Mapping[str, Sequence[Sequence[ImageSource]]],
    columns: Sequence[str],
    path: str | Path,
    title: str = "",
    cell: int = 160,
) -> None:
    """What each variant made of each prompt, beside the concept images that it learned from.

    Args:
        references: the concept's images; they stand on the left, over the whole height.
        rows: row label -> for each column the images of that prompt. Several share a cell; none leaves it empty.
        columns: the prompts, as they are to be read.
        path: where the PNG goes.
        cell: pixels; the side of a cell. Cells with several images are larger.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    for label, cells in rows.items():
        if len(cells) != len(columns):
            raise ValueError(f"row {label!r} has {len(cells)} cells, but there are {len(columns)} prompts")
    most = max((len(cell) for cells in rows.values() for cell in cells), default=1)
    across = ceil(sqrt(max(most, 1)))
    tile = cell if across == 1 else round(cell * (0.8 if across == 2 else 0.6))
    inner, gap, margin = 4, 14, 24
    words = [word for label in rows for word in label.split()]
    label_width = max([122, *(ceil(font(15, bold=True).getlength(word)) for word in words)]) + 16
    wide, high = (count * tile + (count - 1) * inner for count in (across, ceil(max(most, 1) / across)))

    headers = [wrapped(text, font(14), wide) for text in columns]
    header = max([line_count(text) for text in headers] + [1]) * 19 + 10
    top = margin + (40 if title else 0)
    body = len(rows) * (high + gap) - gap
    of_references = Tiles.within(len(references), body, tile, gap if across == 1 else inner, most_wide=2 * tile + gap)
    left = margin + of_references.width + (28 if references else 0)
    width = left + label_width + len(columns) * (wide + gap) - gap + margin
    height = top + header + max(body, of_references.height) + margin

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin - 4), title, font=font(20, bold=True), fill=INK)
    if references:
        draw.text((margin, top + header - 10), "the concept", font=font(14, bold=True), fill=INK, anchor="ld")
        for index, image in enumerate(references):
            x, y = of_references.place(index)
            sheet.paste(square(image, of_references.tile), (margin + x, top + header + y))
        x = left - 15
        draw.line((x, top + header, x, height - margin), fill=PALE, width=2)

    for column, text in enumerate(headers):
        x = left + label_width + column * (wide + gap)
        draw.multiline_text((x, top + header - 10), text, font=font(14), fill=INK, anchor="ld", spacing=3)
    for number, (label, cells) in enumerate(rows.items()):
        y = top + header + number * (high + gap)
        text = wrapped(label, font(15, bold=True), label_width - 16)
        draw.multiline_text((left, y + high // 2), text, font=font(15, bold=True), fill=INK, anchor="lm", spacing=4)
        for column, images in enumerate(cells):
            x = left + label_width + column * (wide + gap)
            if not images:
                draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=PALE, width=2)
                draw.text((x + wide // 2, y + high // 2), "not drawn", font=font(13), fill=GREY, anchor="mm")
            for index, image in enumerate(images):
                place = (x + index % across * (tile + inner), y + index // across * (tile + inner))
                sheet.paste(square(image, tile), place)
    save_png(sheet, path)


def contact_sheet(
    images: Sequence[ImageSource],
    path: str | Path,
    labels: Sequence[str] = (),
    columns: int | None = None,
    cell: int = 128,
) -> None:
    """All images in rows, as nearly square as it goes, each with its label beneath if there are labels.

    Raises:
        ValueError: no images, or another number of labels than of images.
    """
    if not images:
        raise ValueError("there are no images for a contact sheet")
    if labels and len(labels) != len(images):
        raise ValueError(f"there are {len(labels)} labels for {len(images)} images")
    columns = columns or ceil(sqrt(len(images)))
    texts = [wrapped(label, font(12), cell) for label in labels]
    line = max([line_count(text) for text in texts] + [0]) * 16 + (6 if texts else 0)
    gap, margin = 8, 12
    rows = ceil(len(images) / columns)
    size = (
        2 * margin + columns * (cell + gap) - gap,
        2 * margin + rows * (cell + line + gap) - gap,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = margin + index % columns * (cell + gap), margin + index // columns * (cell + line + gap)
        sheet.paste(square(image, cell), (x, y))
        if texts:
            draw.multiline_text((x, y + cell + 3), texts[index], font=font(12), fill=INK, spacing=2)
    save_png(sheet, path)


@dataclass(frozen=True)
class Tiles:
    """Square tiles of one size, filling columns from the top."""

    count: int
    rows: int
    tile: int  # pixels, as is the gap
    gap: int

    @classmethod
    def within(cls, count: int, height: int, tile: int, gap: int, most_wide: int) -> Tiles:
        """In as few and even columns as the height allows; smaller tiles where they would become too wide."""
        tiles = cls(count, 1, tile, gap)
        for share in (1, 0.75, 0.5, 0.4):
            side = round(share * tile)
            columns = max(1, ceil(count / max(1, (height + gap) // (side + gap))))
            tiles = cls(count, ceil(count / columns), side, gap)
            if tiles.width <= most_wide:
                break
        return tiles

    @property
    def width(self) -> int:
        columns = ceil(self.count / self.rows) if self.count else 0
        return max(0, columns * (self.tile + self.gap) - self.gap)

    @property
    def height(self) -> int:
        return max(0, self.rows * (self.tile + self.gap) - self.gap)

    def place(self, index: int) -> tuple[int, int]:
        column, row = divmod(index, self.rows)
        return column * (self.tile + self.gap), row * (self.tile + self.gap)


def square(image: ImageSource, side: int) -> Image.Image:
    """The middle of an image, side x side pixels; small ones are enlarged smoothly."""
    return ImageOps.fit(opened(image), (side, side), Image.Resampling.LANCZOS)


def opened(image: ImageSource) -> Image.Image:
    """RGB, upright as the camera was held."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it along: the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    # the basic layout: the other one depends on whether libraqm is installed
    return ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", name), size, layout_engine=ImageFont.Layout.BASIC
    )


def wrapped(text: str, used: ImageFont.FreeTypeFont, width: int) -> str:
    """The text with line breaks, so that no line is wider than `width` pixels unless one word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and used.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def line_count(text: str) -> int:
    return text.count("\n") + 1


def save_png(image: Image.Image, path: str | Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(Path(path), buffer.getvalue())


# -- scores ---------------------------------------------------------------------------------------------------


def identity_against_text(
    summary: pl.DataFrame,
    path: str | Path,
    title: str,
    concept: str = ALL_CONCEPTS,
    identity: str = "dino",
    text: str = "clip_t",
    labels: Mapping[str, str] | None = None,
) -> None:
    """One point per variant: how well it keeps the concept (up) and follows the prompt (right), as PNG and SVG.

    The cross on a point is its 95 % interval; a point without one has a single image. The base model's identity is
    drawn as the baseline, that of the real images with each other as the ceiling (which has no prompt, hence no text
    alignment).

    Args:
        summary: what tables.summarise returned, for one base model.
        path: where the PNG goes; the SVG goes beside it.
        concept: whose rows to take.
        identity, text: which metrics.
        labels: variant -> words; by default its name as people read it.

    Raises:
        ValueError: no variant has both metrics, or there are several base models.
    """
    save_figure(plane(summary, title, concept, identity, text, labels), path, also_svg=True)


def plane(
    summary: pl.DataFrame,
    title: str,
    concept: str = ALL_CONCEPTS,
    identity: str = "dino",
    text: str = "clip_t",
    labels: Mapping[str, str] | None = None,
    size: tuple[float, float] = (7.6, 5.6),
) -> Figure:
    """The figure of `identity_against_text`, not saved yet; the dotted line is the Pareto front of the means.

    Where variants have different concepts, each says how many, and there is no front: their means do not compare.

    Args:
        title: above it, with a line of what is drawn; without one nothing stands above it.
        size: in inches, at 72 points each.
    """
    rows = summary.filter(pl.col("concept") == concept).with_columns(pl.col("low", "high").fill_null(pl.col("mean")))
    if rows["base_model"].drop_nulls().n_unique() > 1:
        raise ValueError("the summary holds several base models; draw one figure for each")
    up = {row["variant"]: row for row in rows.filter(metric=identity).iter_rows(named=True)}
    right = {row["variant"]: row for row in rows.filter(metric=text).iter_rows(named=True)}
    variants = [variant for variant in up if variant in right]
    if not variants:
        raise ValueError(f"no variant of {concept!r} has both {identity!r} and {text!r} scores")
    variants.sort(key=lambda variant: (variant != BASELINE, variant))
    coverage = Coverage.of_summary(summary)
    gaps = concept == ALL_CONCEPTS and not coverage.whole
    named = {variant: in_words(variant) + (coverage.said(variant) if gaps else "") for variant in variants}
    labels = named | dict(labels or {})
    colours = variant_colours(variants)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
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
        if BASELINE in up:
            lines["baseline: nothing learned"] = up[BASELINE]["mean"]
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
        counted = up[variants[-1]]
        about = f"{counted['images']} images a variant"
        if counted["concepts"] > 1:
            about += f", {counted['concepts']} concepts"
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
        place_labels(figure, axes, points, {labels[v]: colours[v] for v in variants}, arms, written)
    return figure


def variant_colours(variants: Iterable[str]) -> dict[str, str]:
    """A colour for each variant, the same in every figure of these variants; grey for the baseline."""
    learned = sorted(variant for variant in variants if variant != BASELINE)
    return {variant: COLOURS[i % len(COLOURS)] for i, variant in enumerate(learned)} | {BASELINE: GREY}


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


def place_labels(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    arms: Sequence[tuple[float, float, float, float]],
    written: Sequence[Text],
) -> list[Text]:
    """Write each label near its point, where it covers the least of other labels, points, arms and words.

    Greedy: the most crowded point chooses first among eight directions and a few distances; a label that had to
    go far gets a line back to its point.

    Args:
        points: label -> (x, y) in data coordinates.
        colours: label -> colour of the text.
        arms: (x0, y0, x1, y1) in data coordinates: thin lines that labels should not hide.
        written: words that stand on the axes already.
    """
    figure.draw_without_rendering()  # settles the layout, so that data have pixels
    pixel = figure.dpi / 72  # per point
    at = {label: tuple(axes.transData.transform(xy)) for label, xy in points.items()}
    markers = [Bbox.from_bounds(x - 6 * pixel, y - 6 * pixel, 12 * pixel, 12 * pixel) for x, y in at.values()]
    thin = []
    for x0, y0, x1, y1 in arms:
        (left, low), (right, high) = axes.transData.transform([(x0, y0), (x1, y1)])
        thin.append(Bbox.from_extents(left - pixel, low - pixel, right + pixel, high + pixel))
    taken = [text.get_window_extent() for text in written]
    inside = axes.get_window_extent()

    def crowding(label: str) -> float:
        x, y = at[label]
        return -sum(1 / (1 + np.hypot(x - ox, y - oy)) for other, (ox, oy) in at.items() if other != label)

    texts = []
    for label in sorted(points, key=lambda label: (crowding(label), label)):
        text = axes.annotate(
            label, points[label], xytext=(0, 0), textcoords="offset points", fontsize=10, color=colours[label],
            va="center", ha="center", zorder=5, fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],  # a line ends at the words
        )  # fmt: skip
        box = text.get_window_extent()
        best, chosen = np.inf, (0.0, 0.0)
        for distance in (9, 16, 26, 40, 58):
            for across, upward in ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)):
                x = at[label][0] + across * (distance * pixel + box.width / 2)
                y = at[label][1] + upward * (distance * pixel + box.height / 2)
                there = Bbox.from_bounds(x - box.width / 2, y - box.height / 2, box.width, box.height)
                room = there.padded(2 * pixel)
                cost = 0.02 * distance * box.height + 0.3 * box.height * abs(upward * across)
                cost += 20 * sum(overlap(room, other) for other in taken)
                cost += 10 * sum(overlap(room, other) for other in markers)
                cost += 4 * sum(overlap(there, other) for other in thin)
                cost += 20 * (there.width * there.height - overlap(there, inside))
                if cost < best:
                    best, chosen = cost, (x, y)
        x, y = at[label]
        text.set_position(((chosen[0] - x) / pixel, (chosen[1] - y) / pixel))
        # the point of the label's box that is nearest to (x, y), in points from there
        across, upward = (
            float(np.clip(0, middle - half, middle + half)) / pixel
            for middle, half in ((chosen[0] - x, box.width / 2), (chosen[1] - y, box.height / 2))
        )
        if np.hypot(across, upward) > 14:  # nearer than that the eye needs no line
            line = {"arrowstyle": "-", "color": colours[label], "lw": 0.8, "alpha": 0.8, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", points[label], xytext=(across, upward), textcoords="offset points", arrowprops=line)
        taken.append(text.get_window_extent())
        texts.append(text)
    return texts


def overlap(a: Bbox, b: Bbox) -> float:
    """Common area in square pixels."""
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))


def save_figure(figure: Figure, path: str | Path, also_svg: bool = False) -> None:
    path = Path(path)
    for kind in ["png", "svg"] if also_svg else ["png"]:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=kind, metadata=NO_METADATA[kind], facecolor="white")
        write_bytes(path if kind == "png" else path.with_suffix(f".{kind}"), buffer.getvalue())


# -- losses ---------------------------------------------------------------------------------------------------

NO_LOSS = ("stage", "step", "gradient_norm", "lr", "learned", "seconds")


def loss_curve(log_rows: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Each loss over all steps, faint as it was and strong as its moving average; stages side by side.

    Args:
        log_rows: the training log, one mapping a step: "stage", "step", each loss by name, and "gradient_norm",
            which gets a panel of its own; "lr" and "learned" are not drawn.
        path: where the PNG goes.

    Raises:
        ValueError: nothing was logged.
    """
    rows = list(log_rows)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NO_LOSS))
    if not names:
        raise ValueError("no losses were logged, so there is no curve to draw")
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
    """One number of the log, averaged within each stage; returns the averages."""
    sampled: list[float] = []
    for stage in stages:
        steps = [i for i, row in enumerate(rows) if str(row["stage"]) == stage and row.get(name) is not None]
        values = np.array([rows[i][name] for i in steps], dtype=float)
        if not len(values):
            continue
        smooth = moving_average(values, max(1, len(values) // 30))
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=colour, lw=2, label=label if not sampled else None)
        sampled += smooth.tolist()
    return sampled


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and the `reach` values on either side; of as many as there are near the ends."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def loss_sparkline_svg(values: Sequence[float]) -> str:
    """A loss as one small line, as SVG of under 700 characters, for a cell of a table in the Dagster UI.

    Many values are averaged to 40. Commas and single quotes, no hashes: percent-encoding leaves most of it alone.

    Raises:
        ValueError: there are no finite values.
    """
    finite = np.array([value for value in values if np.isfinite(value)], dtype=float)
    if not len(finite):
        raise ValueError("there are no losses to draw")
    means = [piece.mean() for piece in np.array_split(finite, min(40, len(finite)))]
    means = means * 2 if len(means) == 1 else means
    low, high = min(means), max(means)
    xs = np.linspace(2, 158, len(means)).round().astype(int)
    ys = [round(2 + 28 * (high - value) / (high - low)) if high > low else 16 for value in means]
    points = ",".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    return (
        "<svg xmlns='http://www.w3.org/2000/svg' width='160' height='32'>"
        f"<polyline points='{points}' fill='none' stroke='steelblue' stroke-width='2'/></svg>"
    )


# -- small versions -------------------------------------------------------------------------------------------


def thumbnail_webp(image_path: str | Path, limit_bytes: int = 700) -> bytes:
    """The largest, then finest WebP of an image that fits into `limit_bytes`; its shape is kept.

    Raises:
        ValueError: not even a few grey pixels fit.
    """
    image = opened(image_path)
    for side in (160, 128, 112, 96, 80, 64, 48, 40, 32, 24, 16, 8):
        small = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        for quality in (60, 40, 25, 12):
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=6)
            if buffer.tell() <= limit_bytes:
                return buffer.getvalue()
    raise ValueError(f"no WebP of {image_path} fits into {limit_bytes} bytes")
