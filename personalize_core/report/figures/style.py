"""The style that all plots share: colours, fonts, and files that are the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from personalize_core.files.atomic import write_bytes
from personalize_core.metrics.tables import BASELINE

INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#e4e4e4"
# Okabe & Ito 2008: told apart by colour-blind readers; the yellow is left out, too pale for text on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a4fb5", "#56b4e9", "#b8860b", "#8c3b3b", "#4d4d4d", "#5f8f00")
METRIC_WORDS = {"clip_t": "CLIP-T", "clip_t_scaled": "CLIPScore", "clip_i": "CLIP-I", "dino": "DINO score"}
METRIC_WORDS |= {f"{name}_trained_on": f"{METRIC_WORDS[name]} with images trained on" for name in ("clip_i", "dino")}
METRIC_WORDS |= {"judge_cp": "Judge, concept", "judge_pf": "Judge, prompt"}
NO_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a prompt may hold "$", which is not the beginning of a formula
    "svg.hashsalt": "personalize",  # else the ids in an SVG are random
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def variant_colours(variants: Iterable[str], baseline: str = BASELINE) -> dict[str, str]:
    """A colour for each variant, the same in every figure of these variants; grey for the baseline."""
    learned = sorted(variant for variant in variants if variant != baseline)
    return {variant: COLOURS[i % len(COLOURS)] for i, variant in enumerate(learned)} | {baseline: GREY}


def save_figure(figure: Figure, path: str | Path, also_svg: bool = False) -> None:
    path = Path(path)
    for kind in ["png", "svg"] if also_svg else ["png"]:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=kind, metadata=NO_METADATA[kind], facecolor="white")
        write_bytes(path if kind == "png" else path.with_suffix(f".{kind}"), buffer.getvalue())
