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
from personalize_core.report.comparison_in_words import NOISE
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.identity_vs_text import save_scatter_plot
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.sampling.grid import image_name, read_grid
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store


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


def _absent(store: Store, method: str, concept: str) -> list[dict[str, Any]]:
    """Scores that could not be computed, and why: a line for each, of whichever table."""
    found = read_results(store.scores(method, concept) / ABSENT)
    return [{"method": method, "concept": concept, **one} for one in found]


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
