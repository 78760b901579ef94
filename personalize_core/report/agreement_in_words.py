"""How well metrics predict people, as rows that people read: in the terminal and in the report."""

from __future__ import annotations

from typing import Any

import polars as pl

from personalize_core.report.figures.agreement import RATERS

MEASURED = {
    "accuracy": "Answers predicted",
    "kendall": "Kendall's tau-b",
    "spearman": "Spearman's rho",
    "alpha": "Alpha",
}


def for_people(found: pl.DataFrame) -> list[list[str]]:
    """A heading, then a row per question, metric and encoder: raters first, then by the share of answers predicted."""
    ordered = found.sort(
        "question", pl.col("metric") != RATERS, "accuracy", "metric", "encoder",
        descending=[False, False, True, False, False], nulls_last=True,
    )  # fmt: skip
    rows = [
        [row["question"], row["metric"], row["encoder"] or "-", *(_interval(row, name) for name in MEASURED)]
        + [str(row["answers"]), str(row["unscored"])]
        for row in ordered.iter_rows(named=True)
    ]
    return [
        ["Question", "Score", "Encoder", *(f"{words} [95 %]" for words in MEASURED.values()), "Answers", "Left out"],
        *rows,
    ]


def _interval(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    if row[f"{name}_low"] is None:
        return f"{row[name]:.3f}"
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
