"""What copying adds: how much liker images are to the concept images trained on than to those held out.

A method that learned the concept, and not its photographs, is as like to images that it never saw. The base model has
seen neither; what it shows is the choice of the images alone, and `beyond` is a variant's difference less the base
model's.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from personalize_core.metrics import summaries, tables
from personalize_core.metrics.parquet import write_parquet
from personalize_core.metrics.statistics import DRAWS
from personalize_core.metrics.tables import BASELINE, HELD_OUT

IMAGE = ["base_model", "method", "variant", "concept", "encoder", "image", "prompt_index", "image_index"]
MEANS = ["held_out", "trained_on", "difference", "beyond", "beyond_low", "beyond_high"]
COLUMNS: dict[str, str] = {
    **{name: summaries.SUMMARY_COLUMNS[name] for name in ("base_model", "concept", "method", "variant")},
    "metric": "what was measured; with the images trained on its name ends in '_trained_on'",
    "encoder": summaries.SUMMARY_COLUMNS["encoder"],
    "headline": summaries.SUMMARY_COLUMNS["headline"],
    "held_out": "mean score with the concept images that are held out from training",
    "trained_on": "mean score of the same images with the concept images trained on",
    "difference": "trained_on less held_out, image by image: what copying and the choice of the images add",
    "low": "lower end of the 95 % interval of the difference; null where nothing was repeated",
    "high": "upper end of it",
    "error": "standard error of the difference",
    "freedom": summaries.SUMMARY_COLUMNS["freedom"],
    "over": summaries.SUMMARY_COLUMNS["over"],
    "beyond": f"difference less that of {BASELINE!r}, which learned nothing: what copying adds; null where it was not "
    "scored, and for itself",
    "beyond_low": "lower end of the 95 % interval of `beyond`",
    "beyond_high": "upper end of it",
    "images": "how many images the means are over",
    "prompts": "how many different prompts",
    "concepts": "how many concepts: those with images held out",
}


def what_copying_adds(table: pl.DataFrame, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """A row for each variant, metric and encoder, per concept and over all concepts that have images held out.

    Averages and intervals are those of `summaries.summarise`, over differences of one image's two scores. Concepts of
    which all images are trained on, and real images, have no row.

    Returns:
        the columns of `COLUMNS`; no rows where no image is held out.
    """
    tables.check_contract(table := tables.checked(table))
    rows = _both(table)
    numbered = summaries.with_prompts(rows).with_columns(rows["held_out"], rows["trained_on"])
    beyond = {
        tuple(row[name] for name in (*summaries.LABELS, "concept")): row
        for row in summaries.over_baseline(numbered, BASELINE, draws, seed, differences=1)
    }
    found = []
    for labels, group in tables.groups(numbered, summaries.LABELS):
        for concept, cells in summaries.per_concept_and_all(group):
            of = {name: summaries.estimate_of(cells, name, draws, seed) for name in ("held_out", "trained_on", "score")}
            more = beyond.get((*labels.values(), concept), {})
            row = {"held_out": of["held_out"].mean, "trained_on": of["trained_on"].mean}
            added = of["score"].within(*tables.range_of(labels["metric"], differences=1))
            row |= {"difference": added.mean, **summaries.spread(added)}
            row |= {"beyond": more.get("difference")}
            row |= {"beyond_low": more.get("low"), "beyond_high": more.get("high")}
            counted = summaries.counts(cells)
            found.append(
                {**labels, "concept": concept, **row, **{n: counted[n] for n in ("images", "prompts", "concepts")}}
            )
    return summaries.summary_of(found, MEANS, ["images", "prompts", "concepts"]).select(list(COLUMNS))


def _both(table: pl.DataFrame) -> pl.DataFrame:
    """A row for each sampled image, metric and encoder with both scores: `score` is their difference."""
    sampled = table.filter(pl.col("prompt_index").is_not_null())
    held_out = sampled.filter(pl.col("references") == HELD_OUT).with_columns(pl.col("score").alias("held_out"))
    twins = {name: tables.twin_of(name) for name in tables.MEASURES if tables.MEASURES[name].trained_on}
    trained_on = sampled.filter(pl.col("metric").is_in(list(twins))).select(
        *IMAGE, pl.col("metric").replace_strict(twins), pl.col("score").alias("trained_on")
    )
    joined = held_out.join(trained_on, on=[*IMAGE, "metric"], nulls_equal=True, maintain_order="left")
    return joined.with_columns(score=pl.col("trained_on") - pl.col("held_out"))


def write(found: pl.DataFrame, path: Path) -> None:
    """Write what `what_copying_adds` returned, with the meaning of its columns."""
    write_parquet(found, path, COLUMNS)
