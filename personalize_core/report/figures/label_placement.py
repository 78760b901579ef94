"""Labels beside the points of a scatter plot, placed where they hide least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox


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


def is_crowded(axes: Axes, texts: Sequence[Text]) -> bool:
    """Does some label lie on another, or beyond the sides of the axes?"""
    boxes, inside = [text.get_window_extent() for text in texts], axes.get_window_extent()
    beyond = any(box.x0 < inside.x0 or box.x1 > inside.x1 for box in boxes)
    return beyond or any(overlap(one, other) > 0 for one, other in itertools.combinations(boxes, 2))


def overlap(a: Bbox, b: Bbox) -> float:
    """Common area in square pixels."""
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
