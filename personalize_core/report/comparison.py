"""The comparison of everything that was scored: tables, grids and plots, for people and for DVC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import read_results, write_json
from personalize_core.methods import BASELINE
from personalize_core.metrics import costs, parquet, ranking, summaries, tables
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.identity_vs_text import save_scatter_plot
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.sampling.grid import image_name, read_grid
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store

NOISE = "training_noise.parquet"  # only where a method was trained again
METRICS = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}  # in the order of tables for people


def write(
    store: Store,
    cells: Sequence[tuple[str, str]],
    missing: Sequence[tuple[str, str]],
    folder: Path,
    trainings: Sequence[Mapping[int, pl.DataFrame]] = (),
    left_out: Sequence[str] = (),
) -> None:
    """Compare what was scored.

    Args:
        cells: (method, concept) with scores, those of the concept images among them.
        missing: (method, concept) of the experiment without scores; they are listed.
        trainings: of each method that was trained again, seed -> scores; for the noise of its training.
        left_out: trainings again that are not of what is compared here; they are listed.
    """
    table = tables.concatenate([tables.read(store.scores(*cell) / SCORES) for cell in cells])
    summary = summaries.summarise(table)
    headline = summary.filter("headline")
    tables.write(table, folder / SCORES)
    artifacts = [(*cell, store.artifact(*cell)) for cell in cells if cell[0] != REFERENCES]
    with_costs = costs.beside(summary, costs.table(artifacts))
    summaries.write_summary(with_costs, folder / "summary.parquet", costs.COLUMNS)
    write_json(folder / ABSENT, [one for cell in cells for one in _absent(store, *cell)])
    noise = pl.concat([ranking.training_noise(by_seed) for by_seed in trainings]) if trainings else None
    if noise is not None:
        parquet.write_parquet(noise, folder / NOISE, ranking.NOISE_COLUMNS)
    compared = ranking.pairs(table, noise)
    ranking.write(compared, ranking.rank(compared, summary), folder)
    differences = _differences(table)
    if differences is not None:
        summaries.write_summary(differences, folder / "differences.parquet")
    write_json(
        folder / "summary.json",
        {
            "means": _nested(headline.filter(pl.col("concept") == tables.ALL_CONCEPTS)),
            "concepts": sorted({concept for _, concept in cells}),
            "missing": [f"{method}/{concept}" for method, concept in missing],
            "protocol": store.protocol,
            "trainings_left_out": list(left_out),
        },
    )
    concepts = sorted({concept for method, concept in cells if method != REFERENCES})
    for concept in concepts:
        title = f"{concept}: identity against text alignment"
        save_scatter_plot(headline, folder / f"identity_vs_text_{concept}.png", title, concept)
    whole = ConceptCoverage.of_summary(headline).whole
    over = f"{len(concepts)} concepts" if whole else f"the concepts that each has, of {len(concepts)}"
    title = f"Identity against text alignment, mean over {over}"
    save_scatter_plot(headline, folder / "identity_vs_text.png", title)
    for concept in concepts:
        grids = [store.grid(method, concept) for method, other in cells if other == concept and method != REFERENCES]
        _compare_grids(store, concept, grids, folder / f"grid_{concept}.png")


def save_grid(
    store: Store, concept: str, variants: Iterable[tuple[str, Path]], grid: dict[str, Any], path: Path
) -> None:
    """A grid of images: concept images on the left, a row per (variant, folder of its grid), a column per prompt."""
    rows = {
        in_words(variant): [
            [folder / image_name(variant, prompt, image) for image in range(grid["images_per_prompt"])]
            for prompt in range(len(grid["templates"]))
        ]
        for variant, folder in variants
    }
    columns = [template.replace("{}", grid["class_noun"]) for template in grid["templates"]]
    images = concept_files.concept_images(store.concept_folder(concept))
    comparison_grid(images, rows, columns, path, title=concept)


def table(folder: Path, measured: Path) -> list[list[str]]:
    """The summary over all concepts for a terminal: a heading, then a row per variant, the base model first.

    A variant that was not scored on all concepts says on how many.

    measured: the table of costs.
    """
    summary = _headline(folder / "summary.parquet")
    path = folder / "differences.parquet"
    gains = {}
    if path.is_file():
        rows = _headline(path).filter(metric="dino")
        gains = {row["variant"]: row for row in rows.iter_rows(named=True)}
    order = {BASELINE: 0, REFERENCES: 2}
    variants = sorted(summary["variant"].unique(), key=lambda name: (order.get(name, 1), name))
    rows = training_noise(folder).iter_rows(named=True)
    noises = {(row["variant"], row["metric"]): f" noise {row['between']:.3f}" for row in rows}
    taken = pl.read_parquet(measured).filter(concept=tables.ALL_CONCEPTS) if measured.is_file() else pl.DataFrame()
    cost = {row["variant"]: costs.in_words(row) for row in taken.iter_rows(named=True)}
    coverage = _coverage(folder)
    lines = [["Variant", *METRICS.values(), "DINO over the base model", "Cost"]]
    for variant in variants:
        scores = {row["metric"]: row for row in summary.filter(pl.col("variant") == variant).iter_rows(named=True)}
        cells = [
            _interval(scores[metric], "mean") + noises.get((variant, metric), "") if metric in scores else "-"
            for metric in METRICS
        ]
        gained = _interval(gains[variant], "difference") if variant in gains else "-"
        lines.append([in_words(variant) + coverage.note(variant), *cells, gained, cost.get(variant, "-")])
    return lines


def training_noise(folder: Path) -> pl.DataFrame:
    """The noise of training over all concepts, a row for each variant and metric; empty where nothing was repeated."""
    path = folder / NOISE
    return pl.read_parquet(path).filter(concept=tables.ALL_CONCEPTS) if path.is_file() else pl.DataFrame()


def verdicts(folder: Path) -> list[list[str]]:
    """The ranking for a terminal: a heading, then a row per metric and variant, the best mean first."""
    ranked = pl.read_parquet(folder / "rank.parquet")
    lines = [["By", "Place", "Variant", "Verdict"]]
    for metric, words in METRICS.items():
        for row in ranked.filter(metric=metric).iter_rows(named=True):
            places = {row["place_from"], row["place_to"]}
            parts = [
                f"{verb} {', '.join(map(in_words, row[column].split(', ')))}"
                for verb, column in (("above", "above"), (f"{ranking.CANNOT_TELL} from", "cannot_tell_from"))
                if row[column]
            ]
            lines.append(
                [words, " to ".join(map(str, sorted(places))), in_words(row["variant"]), "; ".join(parts) or "-"]
            )
    return lines


def gaps(folder: Path) -> str:
    """What is to be known where not all variants were scored on all concepts; else nothing."""
    coverage = _coverage(folder)
    if coverage.whole:
        return ""
    return (
        f"Not every variant was scored on all {coverage.total} concepts: a mean is over those that the variant has, so "
        "means do not compare; verdicts do, for they look at any two on the images that both have"
    )


def _coverage(folder: Path) -> ConceptCoverage:
    return ConceptCoverage.of_summary(pl.read_parquet(folder / "summary.parquet").filter("headline"))


def intervals_are_over(folder: Path) -> str:
    """What the intervals of `table` let vary, in words."""
    summary = _headline(folder / "summary.parquet")
    sampled = summary.filter(pl.col("variant") != REFERENCES)
    over = sorted(set(sampled["over"].drop_nulls()))
    held = "" if all("concepts" in name for name in over) else ", about these concepts alone"
    return f"95 % intervals over {' and over '.join(over)}{held}" if over else "nothing was repeated: no intervals"


def _absent(store: Store, method: str, concept: str) -> list[dict[str, Any]]:
    """Scores that could not be computed, and why: a line for each, of whichever table."""
    found = read_results(store.scores(method, concept) / ABSENT)
    return [{"method": method, "concept": concept, **one} for one in found]


def _headline(path: Path) -> pl.DataFrame:
    """A summary's rows over all concepts, by the first encoder of each list."""
    return pl.read_parquet(path).filter(pl.col("headline") & (pl.col("concept") == tables.ALL_CONCEPTS))


def _compare_grids(store: Store, concept: str, folders: Sequence[Path], path: Path) -> None:
    """All grids of the same prompts as the first."""
    described = {folder: read_grid(folder) for folder in folders}
    first = described[folders[0]]
    same = [
        (variant, folder)
        for folder, grid in described.items()
        if (grid["templates"], grid["images_per_prompt"]) == (first["templates"], first["images_per_prompt"])
        for variant in grid["variants"]
    ]
    save_grid(store, concept, same, first, path)


def _differences(table: pl.DataFrame) -> pl.DataFrame | None:
    """What each variant adds to the base model; None where the base model itself was not scored."""
    if table.filter(pl.col("variant") == BASELINE).is_empty():
        return None
    return summaries.difference_from_baseline(table)


def _nested(summary: pl.DataFrame) -> dict[str, dict[str, float]]:
    """variant -> metric -> mean, as `dvc metrics` shows it."""
    means: dict[str, dict[str, float]] = {}
    for row in summary.iter_rows(named=True):
        means.setdefault(row["variant"], {})[row["metric"]] = row["mean"]
    return means


def _interval(row: dict[str, Any], name: str) -> str:
    if row["low"] is None:
        return f"{row[name]:.3f}"
    return f"{row[name]:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
