"""The report's tables: on the page for people, and as Parquet, CSV and LaTeX for whoever goes on with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from personalize_core.errors import listed
from personalize_core.metrics import costs, held_out, parquet, ranking, summaries, tables
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.metrics.tables import ALL_CONCEPTS, CEILING
from personalize_core.report import agreement_in_words, published
from personalize_core.report.display_names import in_words
from personalize_core.report.ended_early import ended_early
from personalize_core.report.evidence import METRICS, TEXT, Evidence
from personalize_core.report.table import NOT_RECORDED, Table
from personalize_core.report.verdicts import interval

COSTS = {
    "parameters": "Trained parameters",
    "artifact_bytes": "Artifact",
    "training_seconds": "Training",
    "seconds_per_image": "One image",
    "training_memory_bytes": "Memory in training",
    "sampling_memory_bytes": "Memory in sampling",
}
MEASURED_ON = {"memory_of": "Memory of", "device": "Measured on"}


def every(evidence: Evidence) -> dict[str, Table]:
    """All tables by name; one that has nothing to say is not there."""
    made = [
        overview(evidence),
        cost(evidence),
        verdicts(evidence),
        over_the_baseline(evidence),
        copying(evidence),
        ended_early(evidence),
        agreement(evidence),
        every_measure(evidence),
        by_concept(evidence),
        by_prompt(evidence),
        recipes(evidence),
        measured(evidence),
        beside_published(evidence),
    ]
    return {table.name: table for table in made if len(table.frame)}


def overview(evidence: Evidence) -> Table:
    """A row per variant: its means, its places, its costs."""
    overall = {metric: evidence.overall(metric) for metric in evidence.metrics}
    places = {(row["metric"], row["variant"]): row for row in evidence.rank.iter_rows(named=True)}
    rows, shown = [], []
    for variant in _with_the_ceiling(evidence):
        found = {metric: of[variant] for metric, of in overall.items() if variant in of}
        row: dict[str, Any] = {"variant": variant, "method": next(iter(found.values()))["method"]}
        for metric in evidence.metrics:
            of, place = found.get(metric, {}), places.get((metric, variant), {})
            row |= {f"{metric}_{name}": of.get(name) for name in ("mean", "low", "high")}
            row |= {f"{metric}_{name}": place.get(name) for name in ("place_from", "place_to")}
        row |= {name: evidence.costs.get(variant, {}).get(name) for name in COSTS}
        row["images"] = max(one["images"] for one in found.values())
        row["concepts"] = max(one["concepts"] for one in found.values())
        rows.append(row)
        cells = [interval(found.get(metric), "mean") for metric in evidence.metrics]
        place = [_place(places.get((metric, variant))) for metric in (evidence.identity, TEXT)]
        shown.append([in_words(variant), *_concepts(evidence, variant), *cells, *place])
    schema: dict[str, Any] = {"variant": pl.String(), "method": pl.String()}
    for metric in evidence.metrics:
        schema |= {f"{metric}_{name}": pl.Float64() for name in ("mean", "low", "high")}
        schema |= {f"{metric}_{name}": pl.Int64() for name in ("place_from", "place_to")}
    schema |= dict.fromkeys(COSTS, pl.Float64()) | {"images": pl.Int64(), "concepts": pl.Int64()}
    meanings = {name: _meaning(name) for name in schema}
    names = [f"{METRICS[metric]} [95 %]" for metric in evidence.metrics]
    heading = [
        "Variant",
        *_concepts(evidence),
        *names,
        f"Place, {METRICS[evidence.identity]}",
        f"Place, {METRICS[TEXT]}",
    ]
    return Table(
        "overview",
        "Scores and places",
        pl.DataFrame(rows, schema=schema),
        meanings,
        [heading, *shown],
        "A place is a range where verdicts leave the order undecided; all places by a score hold together at 95 %."
        + ("" if evidence.coverage.whole else " Means over different concepts do not compare; places do."),
    )


def cost(evidence: Evidence) -> Table:
    """A row per variant: what it cost, as far as it was recorded."""
    known = [evidence.costs.get(variant, {}) for variant in evidence.variants]
    recorded = [name for name in COSTS if any(row.get(name) is not None for row in known)]
    schema: dict[str, Any] = {"variant": pl.String()} | dict.fromkeys(recorded, pl.Float64())
    of = dict(zip(evidence.variants, known, strict=True)) if recorded else {}
    found = [{"variant": variant, **{name: row.get(name) for name in recorded}} for variant, row in of.items()]
    shown = [
        [in_words(variant), *(for_people(name, row.get(name)) for name in recorded)] for variant, row in of.items()
    ]
    meanings = {name: _meaning(name) for name in schema}
    heading = ["Variant", *(COSTS[name] for name in recorded)]
    return Table("costs", "Costs", pl.DataFrame(found, schema=schema), meanings, [heading, *shown])


def verdicts(evidence: Evidence) -> Table:
    """Any two variants, by each metric."""
    frame, whole = evidence.pairs, evidence.coverage.whole
    shown = [
        [METRICS[row["metric"]], in_words(row["variant"]), in_words(row["other"]), row["verdict"],
         interval(row, "difference"), *([row["pairing"]] if evidence.external else []),
         str(row["images"]), *([] if whole else [str(row["concepts"])])]
        for row in frame.iter_rows(named=True)
    ]  # fmt: skip
    heading = ["Score", "Variant", "Beside", "Verdict", "Difference [together 95 %]"]
    heading += ["Compared by", "Images"] if evidence.external else ["Pairs of images"]
    heading += [] if whole else ["Concepts that both have"]
    return Table(
        "verdicts",
        "Any two variants" if evidence.external else "Any two variants, paired by prompt and noise",
        frame,
        ranking.PAIR_COLUMNS,
        [heading, *shown],
    )


def over_the_baseline(evidence: Evidence) -> Table:
    """What each variant adds to the baseline."""
    if evidence.differences is None:
        return Table("over_the_baseline", "", pl.DataFrame(), {}, [])
    frame = evidence.differences
    rows = _headline(frame.filter(concept=ALL_CONCEPTS), evidence)
    shown = [
        [
            in_words(variant),
            *_concepts(evidence, variant),
            *(interval(of.get(metric), "difference") for metric in evidence.metrics),
            *([next(iter(of.values()))["pairing"]] if evidence.external else []),
        ]
        for variant, of in rows.items()
    ]
    heading = ["Variant", *_concepts(evidence), *(f"{METRICS[metric]} [95 %]" for metric in evidence.metrics)]
    heading += ["Compared by"] if evidence.external else []
    return Table(
        "over_the_baseline",
        f"What each variant adds to the baseline, {in_words(evidence.baseline)}",
        frame,
        {name: summaries.SUMMARY_COLUMNS[name] for name in frame.columns},
        [heading, *shown],
        "Each interval stands alone; the verdicts correct for looking at many.",
    )


def copying(evidence: Evidence) -> Table:
    """Identity with the images held out and with those trained on, and their difference."""
    if evidence.copying is None:
        return Table("copying", "", pl.DataFrame(), {}, [])
    frame = evidence.copying
    metrics = [metric for metric in evidence.metrics if metric in set(frame["metric"])]
    shown = []
    for row in frame.filter(pl.col("metric").is_in(metrics), pl.col("concept") == ALL_CONCEPTS).iter_rows(named=True):
        beyond = {"beyond": row["beyond"], "low": row["beyond_low"], "high": row["beyond_high"]}
        cells = [_number(row["held_out"]), _number(row["trained_on"])]
        cells += [interval(row, "difference"), interval(beyond, "beyond")]
        shown.append([METRICS[row["metric"]], in_words(row["variant"]), *cells, str(row["concepts"])])
    order = {in_words(variant): place for place, variant in enumerate(evidence.variants)}
    shown.sort(key=lambda cells: ([METRICS[metric] for metric in metrics].index(cells[0]), order[cells[1]]))
    heading = [
        "Score",
        "Variant",
        "Held out",
        "Trained on",
        "Difference [95 %]",
        "Beyond the base model [95 %]",
        "Concepts",
    ]
    return Table(
        "copying",
        "What copying adds",
        frame,
        held_out.COLUMNS,
        [heading, *shown],
        "The same images, compared with the concept images held out and with those trained on. The base model copies "
        "nothing, so its difference is that of the images themselves; what a variant has beyond it, copying adds. Each "
        "interval stands alone.",
    )


def agreement(evidence: Evidence) -> Table:
    """How well each metric predicts the answers of a study."""
    if evidence.agreement is None:
        return Table("agreement", "", pl.DataFrame(), {}, [])
    meanings = parquet.meanings_in(evidence.agreement_file)
    notes = evidence.agreement["note"].drop_nulls().unique(maintain_order=True).to_list()
    return Table(
        "agreement",
        "Agreement of scores with people",
        evidence.agreement,
        {name: meanings[name] for name in evidence.agreement.columns},
        agreement_in_words.for_people(evidence.agreement),
        "Intervals are over raters and concepts. The row of another rater is how often two raters agree; a score can "
        "hardly predict people better." + judged(evidence.agreement) + "".join(f" Note: {note}." for note in notes),
    )


def every_measure(evidence: Evidence) -> Table:
    """All scores by all encoders, texts, scalings and masks, over all concepts."""
    frame = evidence.every_mean.filter(concept=ALL_CONCEPTS).select(
        name for name in evidence.every_mean.columns if name in summaries.SUMMARY_COLUMNS
    )
    further = {"micro": "Over all pairs", "n_empty": "Without the concept", "concepts": "Concepts"}
    there = [name for name in further if name in frame.columns]
    coverage = ConceptCoverage.of_summary(evidence.every_mean, set(evidence.every_mean["metric"]))
    there = [name for name in there if name != "concepts" or not coverage.whole]
    shown = [
        [row["metric"], row["encoder"], in_words(row["variant"]), interval(row, "mean")]
        + [
            _number(row[name]) if name == "micro" else str(row[name] if row[name] is not None else "-")
            for name in there
        ]
        for row in frame.iter_rows(named=True)
    ]
    return Table(
        "every_measure",
        "Every measure side by side",
        frame,
        {name: summaries.SUMMARY_COLUMNS[name] for name in frame.columns},
        [["Score", "Encoder", "Variant", "Mean [95 %]", *(further[name] for name in there)], *shown],
        "Means over concepts; rows of different scores or encoders cannot be compared." + judged(frame),
    )


def judged(frame: pl.DataFrame) -> str:
    """A sentence that says which scores among those of a table a model gave; empty where it gave none."""
    given = frame.filter(pl.col("metric").is_in([name for name, one in tables.MEASURES.items() if one.judged]))
    if given.is_empty():
        return ""
    metrics, models = (given[name].unique().sort().to_list() for name in ("metric", "encoder"))
    verb = "was" if len(metrics) == 1 else "were"
    return f" {listed(metrics)} {verb} given by a vision-language model, {listed(models)}, that was shown the images."


def by_concept(evidence: Evidence) -> Table:
    frame = evidence.summary.filter(pl.col("concept") != ALL_CONCEPTS)
    shown = []
    for concept in evidence.concepts:
        rows = _headline(frame.filter(concept=concept.name), evidence)
        for variant, of in rows.items():
            cells = [interval(of.get(metric), "mean") for metric in evidence.metrics]
            shown.append([concept.name, in_words(variant), *cells])
    heading = ["Concept", "Variant", *(f"{METRICS[metric]} [95 %]" for metric in evidence.metrics)]
    meanings = summaries.SUMMARY_COLUMNS | costs.COLUMNS
    frame_meanings = {name: meanings[name] for name in frame.columns}
    return Table("by_concept", "By concept", frame, frame_meanings, [heading, *shown])


def by_prompt(evidence: Evidence) -> Table:
    """Means over all concepts and images of a prompt; without intervals, for few images stand behind each.

    Where variants have different concepts, each row says how many.
    """
    sampled = evidence.scores.filter((pl.col("method") != CEILING) & pl.col("metric").is_in(evidence.metrics))
    by = ["prompt", "variant", "metric"]
    by_concept = sampled.group_by([*by, "concept"]).agg(pl.col("score").mean(), pl.len().alias("images"))
    frame = (
        by_concept.group_by(by)
        .agg(
            pl.col("score").mean().alias("mean"),
            pl.col("images").sum(),
            pl.col("concept").n_unique().alias("concepts"),
        )
        .sort(by)
        .with_columns(pl.col("images", "concepts").cast(pl.Int64))
    )
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in frame.iter_rows(named=True):
        found.setdefault((row["prompt"], row["variant"]), {"concepts": 0})[row["metric"]] = row["mean"]
        found[row["prompt"], row["variant"]]["concepts"] = row["concepts"]
    whole = evidence.coverage.whole
    shown = [
        [prompt.replace("{}", "…"), in_words(variant), *([] if whole else [str(of["concepts"])])]
        + [_number(of.get(metric)) for metric in evidence.metrics]
        for (prompt, variant), of in found.items()
    ]
    meanings = {
        "prompt": "the prompt template, with {} for the concept",
        "variant": tables.COLUMNS["variant"].meaning,
        "metric": tables.COLUMNS["metric"].meaning,
        "mean": "mean over a concept's images of this prompt, then over concepts",
        "images": "how many images",
        "concepts": "how many concepts were sampled with it",
    }
    heading = ["Prompt", "Variant", *_concepts(evidence), *(METRICS[metric] for metric in evidence.metrics)]
    return Table("by_prompt", "By prompt", frame, meanings, [heading, *shown], "Means without intervals.")


def recipes(evidence: Evidence) -> Table:
    """Every option of every trained method, and the published value where another was used."""
    rows = [
        {"method": method.name, **row}
        for method in evidence.methods
        if method.learned
        for row in recipe(method.learned[0].described.get("config", {}), method.published)
    ]
    schema: dict[str, Any] = dict.fromkeys(("method", "option", "value", "published"), pl.String())
    meanings = {
        "method": tables.COLUMNS["method"].meaning,
        "option": "of its recipe",
        "value": "as used, of the first concept, as JSON",
        "published": "value of the published recipe where another was used; else null",
    }
    shown = [[in_words(row["method"]), row["option"], row["value"], row["published"] or "-"] for row in rows]
    heading = ["Method", "Option", "Value", "Published, if different"]
    return Table("recipes", "Recipes", pl.DataFrame(rows, schema=schema), meanings, [heading, *shown])


def recipe(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """Option, value, and the published value where it is another."""
    return [
        {
            "option": option,
            "value": json.dumps(value),
            "published": json.dumps(defaults[option]) if option in defaults and defaults[option] != value else None,
        }
        for option, value in config.items()
    ]


def measured(evidence: Evidence) -> Table:
    """The contract of every score."""
    contract = {
        "metric": "Score",
        "encoder": "Encoder",
        "encoder_sha256": "Weights (sha256)",
        "preprocessing": "Preprocessing",
        "text_variant": "Text",
        "scaling": "Scaling",
        "pairing": "Pairing",
        "references": "Concept images",
        "mask": "Mask",
    }
    columns = [name for name in contract if name in evidence.every_score.columns]
    frame = evidence.every_score.select(columns).unique().sort(columns)
    frame = frame.with_columns(meaning=pl.col("metric").replace_strict(tables.METRICS))
    shown = [
        [tables.short(row[name]) if row[name] else "-" for name in columns] + [row["meaning"]]
        for row in frame.iter_rows(named=True)
    ]
    meanings = {name: tables.COLUMNS[name].meaning for name in columns}
    meanings |= {"meaning": "what is computed, and its scale"}
    heading = [*(contract[name] for name in columns), "What it is"]
    return Table("contract", "How every score was measured", frame, meanings, [heading, *shown])


def beside_published(evidence: Evidence) -> Table:
    """Every published score that we could lay beside ours, and why or why not."""
    rows = published.beside(published.Ours.of(evidence))
    schema: dict[str, Any] = dict.fromkeys(("paper", "table", "method", "metric", "value", "differs"), pl.String())
    schema |= dict.fromkeys(("mean", "low", "high"), pl.Float64())
    frame = pl.DataFrame([vars(row) | {"differs": "; ".join(row.differs)} for row in rows], schema=schema)
    matching = [row for row in rows if not row.differs]
    shown = [[row.paper, row.table, row.method, row.metric, row.value, interval(vars(row), "mean")] for row in matching]
    meanings = {
        "paper": "whose table it is",
        "table": "which of its tables",
        "method": "as the table calls it",
        "metric": "as the table calls it",
        "value": "as it is printed there",
        "differs": "in what its contract differs from ours, or leaves open; empty where both are the same",
        "mean": "ours, where nothing differs and we have that method",
        "low": summaries.SUMMARY_COLUMNS["low"],
        "high": summaries.SUMMARY_COLUMNS["high"],
    }
    heading = ["Paper", "Table", "Method", "Score", "Published", "Ours [95 %]"]
    return Table("published", "Published scores under the same contract", frame, meanings, [heading, *shown])


def for_people(cost: str, value: float | None) -> str:
    """A cost with its unit."""
    if value is None:
        return NOT_RECORDED
    if cost == "parameters":
        return f"{value:,.0f}"
    if cost.endswith("bytes"):
        if value < 1000:
            return f"{value:.0f} bytes"
        return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2f} s"


def _headline(frame: pl.DataFrame, evidence: Evidence) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> metric -> row, the base model first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in frame.filter(pl.col("metric").is_in(evidence.metrics)).iter_rows(named=True):
        found.setdefault(row["variant"], {})[row["metric"]] = row
    return {variant: found[variant] for variant in _with_the_ceiling(evidence) if variant in found}


def _with_the_ceiling(evidence: Evidence) -> list[str]:
    real = CEILING in set(evidence.summary.filter(concept=ALL_CONCEPTS)["variant"])
    return [*evidence.variants, *([CEILING] if real else [])]


def _concepts(evidence: Evidence, variant: str | None = None) -> list[str]:
    """The cell that says over how many concepts a variant is, or its heading; none where all are over all of them."""
    if evidence.coverage.whole:
        return []
    return ["Concepts" if variant is None else evidence.coverage.count(variant)]


def _place(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    first, last = row["place_from"], row["place_to"]
    return str(first) if first == last else f"{first} to {last}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _meaning(name: str) -> str:
    if name in COSTS:
        return costs.ALL_COLUMNS[name]
    if name in ("variant", "method"):
        return tables.COLUMNS[name].meaning
    if name == "images":
        return "how many images the means are over"
    if name == "concepts":
        return "how many concepts the means are over"
    metric, _, what = next(
        (m, "_", name.removeprefix(f"{m}_")) for m in sorted(METRICS, key=len, reverse=True) if name.startswith(f"{m}_")
    )
    return f"{METRICS[metric]}: {(summaries.SUMMARY_COLUMNS | ranking.RANK_COLUMNS)[what]}"
