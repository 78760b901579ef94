"""Scores by the kind of prompt: what helps in a new scene may hurt a new style, or a change of the concept itself.

Personalized Residuals (Ham et al. 2024) reports of LAG that it helps where the concept is put somewhere else, and hurts
where it is to change. Which prompt is of which kind the paper does not list; the rules are ours.
"""

from __future__ import annotations

import re
from typing import Any

import polars as pl

from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import ImageInputs
from personalize_core.analyses.per_prompt import CELL, PLOTTED, WAY
from personalize_core.analyses.shared_plots import Panel, dots
from personalize_core.concepts.concept import SLOT
from personalize_core.metrics.tables import BASELINE, CEILING, shown
from personalize_core.report.figures.style import METRIC_WORDS

TITLE = "By the kind of prompt"
RECONTEXTUALIZATION, STYLE, PROPERTY = KINDS = ("recontextualization", "style", "property")
HOW = (
    "A prompt asks for a style where it names an art form, or 'in the style of'; for a property where a colour, a "
    "shape, a state or a material is said of the concept itself, or it is reimagined as another; else it puts the "
    "concept into a scene. Means."
)
_STYLE = re.compile(
    r"\b(style of|painting|drawing|sketch|watercolou?r|manga|anime|cartoon|comic|graffiti|sculpture|statue|bust|icon|"
    r"print|woodcut|woodblock|illustration|origami|crochet|latte art|pixel art|engraving|painted|brushstrokes|"
    r"poster of)\b",
    re.IGNORECASE,
)
_QUALITIES = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|grey|gray|golden|silver|colou?rful|clear|"
    r"transparent|shiny|wet|dirty|broken|old|new|tiny|giant|huge|furry|fluffy|\w+[ -]shaped|wooden|metal|glass"
)
_PROPERTY = re.compile(
    rf"\b({_QUALITIES})\s+{re.escape(SLOT)}|{re.escape(SLOT)}\s+((is\s+)?made (out )?of|reimagined as|"
    rf"with intricate \w+ carvings)\b",
    re.IGNORECASE,
)
MEANINGS = {
    "variant": "the sampling variant",
    "metric": "what was measured, as in the table of scores",
    "encoder": "the network whose features were compared",
    "kind": f"of the prompt: {', '.join(KINDS)}",
    "prompts": "how many prompts of this kind",
    "images": "how many images",
    "mean": "of their scores",
    "difference": "mean of score less the base model's of the same prompt and noise; null where it has none",
    "over_first": "mean of score less that of the first variant, of the same prompt and noise; 0 for itself",
}


def kind_of(template: str) -> str:
    """One of KINDS. A style comes first: "a red {} in the style of Monet" asks for one."""
    if _STYLE.search(template):
        return STYLE
    return PROPERTY if _PROPERTY.search(template) else RECONTEXTUALIZATION


def breakdown(scores: pl.DataFrame, baseline: pl.DataFrame | None, first: str) -> list[dict[str, Any]]:
    """Rows of MEANINGS from a method's table of scores and the base model's, of one concept.

    Args:
        first: the variant that the others are compared with.
    """
    kinds = pl.col("prompt").map_elements(kind_of, return_dtype=pl.String)
    sampled = scores.filter(pl.col("variant") != CEILING).with_columns(kind=kinds)
    others = [(sampled.filter(variant=first), "of_first")]
    if baseline is not None:
        others.append((baseline.filter(variant=BASELINE), "of_base"))
    for table, name in others:
        under = table.select(*WAY, *CELL, pl.col("score").alias(name))
        sampled = sampled.join(under, on=[*WAY, *CELL], how="left", nulls_equal=True)
    if baseline is None:
        sampled = sampled.with_columns(of_base=pl.lit(None, pl.Float64))
    return (
        sampled.group_by("variant", *WAY, "kind", maintain_order=True)
        .agg(
            prompts=pl.col("prompt").n_unique().cast(pl.Int64),
            images=pl.len().cast(pl.Int64),
            mean=pl.col("score").mean(),
            difference=(pl.col("score") - pl.col("of_base")).mean(),
            over_first=(pl.col("score") - pl.col("of_first")).mean(),
        )
        .sort("variant", *WAY, pl.col("kind").replace_strict(KINDS, range(len(KINDS)), return_dtype=pl.Int64))
        .select(list(MEANINGS))
        .to_dicts()
    )


def analyse(inputs: ImageInputs, findings: Findings) -> None:
    scores, baseline, name = inputs.scores, inputs.baseline_scores, inputs.concept.name
    if scores is None:
        raise NotDefined(f"its images have not been scored; `personalize evaluate {name} -m {inputs.method}` does it")
    kinds = [kind for kind in KINDS if kind in {kind_of(template) for template in inputs.grid.templates}]
    if len(kinds) < 2:
        raise NotDefined(f"all prompts are of one kind, {kinds[0]}; a list with several kinds shows more")
    variants = inputs.grid.variants
    found = breakdown(scores, None if inputs.made_elsewhere else baseline, variants[0])
    findings.table("per_kind.parquet", found, MEANINGS, "the mean of every metric over each kind of prompt")
    table = scores.filter("headline", pl.col("variant") != CEILING)
    panels = []
    for metric in (shown(metric, set(table["metric"])) for metric in PLOTTED):
        for encoder in sorted(table.filter(metric=metric)["encoder"].unique().to_list()):
            rows = table.filter(metric=metric, encoder=encoder)
            series = {variant: _by_kind(rows.filter(variant=variant), kinds) for variant in variants}
            panels.append(Panel(f"{METRIC_WORDS.get(metric, metric)}, by {encoder}", series))
    path = findings.image("per_kind_scores.png", "scores by the kind of prompt; pale dots are single images")
    dots(panels, kinds, path, f"{name}, by the kind of prompt", "pale: single images; strong: their mean")


def _by_kind(rows: pl.DataFrame, kinds: list[str]) -> list[list[float]]:
    """The scores of each kind."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for prompt, score in rows.select("prompt", "score").iter_rows():
        if score is not None:
            found[kind_of(prompt)].append(score)
    return list(found.values())
