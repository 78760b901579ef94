"""The comparison of everything that was scored: tables, grids and plots, for people and for DVC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.concepts import concept_files
from personalize_core.concepts.image_files import load_image
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_results, write_json
from personalize_core.metrics import costs, held_out, parquet, ranking, summaries, tables
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.report.comparison_in_words import COPYING, NOISE, metrics_of
from personalize_core.report.display_names import in_words
from personalize_core.report.figures.identity_vs_text import save_scatter_plot
from personalize_core.report.figures.image_grids import comparison_grid
from personalize_core.sampling.grid import located, read_grid
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store

MOST_SHOWN = (60, 16)  # prompts, and images of each, in a concept's grid of images; a column from outside may have more


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
    baseline = store.params.baseline
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
    copied = held_out.what_copying_adds(table)
    if len(copied):
        held_out.write(copied, folder / COPYING)
    differences = _differences(table, baseline)
    if differences is not None:
        summaries.write_summary(differences, folder / "differences.parquet")
    write_json(
        folder / "summary.json",
        {
            "means": _nested(headline.filter(pl.col("concept") == tables.ALL_CONCEPTS)),
            "concepts": sorted({concept for _, concept in cells}),
            "missing": [f"{method}/{concept}" for method, concept in missing],
            "protocol": store.protocol,
            "baseline": baseline,
            "trainings_left_out": list(left_out),
        },
    )
    concepts = sorted({concept for method, concept in cells if method != REFERENCES})
    for concept in concepts:
        title = f"{concept}: identity against text alignment"
        save_scatter_plot(headline, folder / f"identity_vs_text_{concept}.png", title, concept, baseline=baseline)
    whole = ConceptCoverage.of_summary(headline, metrics_of(headline["metric"])).whole
    over = f"{len(concepts)} concepts" if whole else f"the concepts that each has, of {len(concepts)}"
    title = f"Identity against text alignment, mean over {over}"
    save_scatter_plot(headline, folder / "identity_vs_text.png", title, baseline=baseline)
    for concept in concepts:
        grids = [store.grid(method, concept) for method, other in cells if other == concept and method != REFERENCES]
        _compare_grids(store, concept, grids, folder / f"grid_{concept}.png")


def save_grid(
    store: Store,
    concept: str,
    variants: Iterable[tuple[str, Path]],
    grid: Mapping[str, Any],
    path: Path,
    most: tuple[int, int] | None = None,
) -> None:
    """A grid of images: concept images on the left, a row per (variant, folder of its grid), a column per prompt.

    Args:
        grid: the description of the first variant's grid, of whose prompts the images are.
        most: how many prompts, and images of each, are shown at most; None: all. The title says
            if there are more prompts.
    """
    prompts, images = most or (len(grid["templates"]), grid["images_per_prompt"])
    title = concept
    if (there := len(grid["templates"])) > prompts:
        title += f" (the first {prompts} of {there:,} prompts)"
    templates = grid["templates"][:prompts]
    rows = {}
    for variant, folder in variants:
        own = grid if variant in grid["variants"] else read_grid(folder)
        column = _columns(own["templates"], templates)
        cells: list[list[Path]] = [[] for _ in templates]
        for image in located(folder, own, store.root):
            cell = cells[column[image.prompt]] if image.prompt in column else None
            if image.variant == variant and cell is not None and len(cell) < images and _shows(image.path, own):
                cell.append(image.path)
        words = in_words(variant)
        rows[words if words not in rows else f"{words} ({variant})"] = cells
    columns = [template.replace("{}", grid["class_noun"]) for template in templates]
    references = concept_files.concept_images(store.concept_folder(concept))
    comparison_grid(references, rows, columns, path, title=title)


def _columns(own: Sequence[str], shown: Sequence[str]) -> dict[int, int]:
    """Place in a grid's own list of prompts -> place among those that are shown."""
    if list(own[: len(shown)]) == list(shown):
        return {place: place for place in range(len(shown))}
    return {place: list(shown).index(template) for place, template in enumerate(own) if template in shown}


def _shows(path: Path, grid: Mapping[str, Any]) -> bool:
    """False for an image made elsewhere that cannot be read; it is left out of the scores with its reason."""
    if "external" not in grid:
        return True
    try:
        load_image(path)
    except InputError:
        return False
    return True


def _absent(store: Store, method: str, concept: str) -> list[dict[str, Any]]:
    """Scores that could not be computed, and why: a line for each, of whichever table."""
    found = read_results(store.scores(method, concept) / ABSENT)
    return [{"method": method, "concept": concept, **one} for one in found]


def _compare_grids(store: Store, concept: str, folders: Sequence[Path], path: Path) -> None:
    """All grids of the same prompts as the first, and external columns that have some of them."""
    described = {folder: read_grid(folder) for folder in folders}
    first = described[folders[0]]
    same = [
        (variant, folder)
        for folder, grid in described.items()
        if (grid["templates"], grid["images_per_prompt"]) == (first["templates"], first["images_per_prompt"])
        or ("external" in grid and _columns(grid["templates"], first["templates"]))
        for variant in grid["variants"]
    ]
    save_grid(store, concept, same, first, path, MOST_SHOWN)


def _differences(table: pl.DataFrame, baseline: str) -> pl.DataFrame | None:
    """What each variant adds to the baseline; None where that is the base model, and it was not scored."""
    if baseline == tables.BASELINE and table.filter(pl.col("variant") == baseline).is_empty():
        return None
    return summaries.difference_from_baseline(table, baseline)


def _nested(summary: pl.DataFrame) -> dict[str, dict[str, float]]:
    """variant -> metric -> mean, as `dvc metrics` shows it."""
    means: dict[str, dict[str, float]] = {}
    for row in summary.iter_rows(named=True):
        means.setdefault(row["variant"], {})[row["metric"]] = row["mean"]
    return means
