"""Scores prompt by prompt: a mean over all prompts hides which of them a method fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import ImageInputs
from personalize_core.analyses.shared_plots import Panel, dots
from personalize_core.metrics.tables import BASELINE, CEILING, shown
from personalize_core.report.figures.style import METRIC_WORDS

TITLE = "Prompt by prompt"
HOW = (
    "The mean over each prompt's images, from the table of scores; the difference from the base model is the mean "
    "over the images that share prompt and noise with one of its. Few images a prompt: a look, not a verdict."
)
PLOTTED = ("clip_t", "dino")  # the panels of the plot
MEANINGS = {
    "variant": "the sampling variant",
    "metric": "what was measured, as in the table of scores",
    "encoder": "the network whose features were compared",
    "prompt_index": "place in the prompt list, from 0",
    "prompt": "the prompt template",
    "images": "how many images",
    "mean": "of their scores",
    "least": "the least of them",
    "greatest": "the greatest of them",
    "difference": "mean of score less the base model's on the same cell; null where it has none",
}
WAY = ["metric", "encoder"]
CELL = ["prompt_index", "prompt", "image_index"]


def breakdown(scores: pl.DataFrame, baseline: pl.DataFrame | None) -> list[dict[str, Any]]:
    """Rows of MEANINGS from a method's table of scores and the base model's, of one concept."""
    sampled = scores.filter(pl.col("variant") != CEILING)
    if baseline is None:
        paired = sampled.with_columns(difference=pl.lit(None, pl.Float64))
    else:
        under = baseline.filter(variant=BASELINE).select(*WAY, *CELL, pl.col("score").alias("baseline"))
        paired = sampled.join(under, on=[*WAY, *CELL], how="left", nulls_equal=True)
        paired = paired.with_columns(difference=pl.col("score") - pl.col("baseline"))
    return (
        paired.group_by("variant", *WAY, "prompt_index", "prompt", maintain_order=True)
        .agg(
            images=pl.len().cast(pl.Int64),
            mean=pl.col("score").mean(),
            least=pl.col("score").min(),
            greatest=pl.col("score").max(),
            difference=pl.col("difference").mean(),
        )
        .sort("variant", *WAY, "prompt_index")
        .select(list(MEANINGS))
        .to_dicts()
    )


def plot(scores: Sequence[pl.DataFrame], path: Path, title: str) -> None:
    """A row for each prompt, each variant's images as dots. scores: tables of one concept, the base model's too."""
    table = pl.concat(
        [one.filter("headline", pl.col("variant") != CEILING).select("variant", *WAY, *CELL, "score") for one in scores]
    )
    # by text, by which the rows are filled: a list may hold a prompt twice
    prompts = table.sort("prompt_index", maintain_order=True)["prompt"].unique(maintain_order=True).to_list()
    variants = sorted(table["variant"].unique().to_list(), key=lambda name: (name != BASELINE, name))
    panels = []
    for metric in (shown(metric, set(table["metric"])) for metric in PLOTTED):
        rows = table.filter(metric=metric)
        for encoder in sorted(rows["encoder"].unique().to_list()):
            mine = rows.filter(encoder=encoder)
            series = {
                variant: [mine.filter(variant=variant, prompt=prompt)["score"].to_list() for prompt in prompts]
                for variant in variants
            }
            panels.append(Panel(f"{METRIC_WORDS.get(metric, metric)}, by {encoder}", series))
    dots(panels, prompts, path, title, "pale: single images; strong: their mean")


def analyse(inputs: ImageInputs, findings: Findings) -> None:
    scores, baseline, name = inputs.scores, inputs.baseline_scores, inputs.concept.name
    if scores is None:
        raise NotDefined(f"its images have not been scored; `personalize evaluate {name} -m {inputs.method}` does it")
    if inputs.made_elsewhere:
        findings.absent["difference"] = "images made elsewhere share no noise with the base model's"
    elif baseline is None:
        findings.absent["difference"] = "the base model's images of this concept have not been scored"
    findings.table("per_prompt.parquet", breakdown(scores, baseline), MEANINGS, "every prompt's mean of every metric")
    shown = [scores] if baseline is None or inputs.is_baseline else [baseline, scores]
    path = findings.image("per_prompt_scores.png", "each prompt's scores; pale dots are single images")
    plot(shown, path, f"{name}, prompt by prompt")
