"""The tables of scores: which columns they have and what those mean, on disk and summarised.

One row is one score of one picture, so that every average can be taken later, and taken differently. A score that
could not be computed has no row. Scores of different encoders never stand in one table.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from personalize_core.errors import InputError, listed
from personalize_core.files import write_bytes

FLOOR = "base_model"  # the variant that learned nothing
CEILING = "real_images"  # method and variant of the rows that compare the real images with each other
ALL_CONCEPTS = "all concepts"  # in a summary; no concept can be called so, for names have no spaces
DRAWS = 10_000

METRICS: dict[str, str] = {
    "clip_t": "cosine of the picture with the text that it was drawn for, in [-1, 1]",
    "clip_t_scaled": "CLIPScore: 2.5 * max(clip_t, 0), in [0, 2.5]; as published near 0.7 to 0.8",
    "clip_i": "mean cosine with the concept's images, by the text-image encoder, in [-1, 1]",
    "dino": "mean cosine with the concept's images, by the identity encoder, in [-1, 1]",
}


@dataclass(frozen=True)
class Column:
    dtype: pl.DataType
    meaning: str
    nullable: bool = False


def text(meaning: str, nullable: bool = False) -> Column:
    return Column(pl.String(), meaning, nullable)


COLUMNS: dict[str, Column] = {
    "base_model": text("name of the base model that drew the picture; null for a real image", nullable=True),
    "concept": text("name of the concept"),
    "method": text(f"how the concept was learned; {FLOOR!r} learned nothing, {CEILING!r} is no method"),
    "variant": text("the method with its sampling options; a method's plain variant has the method's name"),
    "prompt_index": Column(pl.Int64(), "place in the prompt list, from 0; null for a real image", nullable=True),
    "prompt": text("the template that was drawn, with {} for the concept; null for a real image", nullable=True),
    "image_index": Column(pl.Int64(), "which picture of this prompt, from 0; equal indices share their first noise"),
    "image": text("path of the picture, relative to the workspace, with '/'"),
    "image_sha256": text("sha256 of the picture's file"),
    "metric": text("what was measured: " + "; ".join(f"{name}: {meaning}" for name, meaning in METRICS.items())),
    "encoder": text("the network whose features were compared"),
    "encoder_sha256": text("sha256 of that network's weights file"),
    "preprocessing": text("what happened to a picture before that network saw it"),
    "text": text("what a clip_t row compared the picture with; null for the other metrics", nullable=True),
    "score": Column(pl.Float64(), "the score; higher is more alike; never NaN"),
}
SCHEMA = pl.Schema({name: column.dtype for name, column in COLUMNS.items()})

CELL = ["concept", "prompt_index", "image_index"]  # one place in the grid, the same for every variant
ENCODER = ["encoder", "encoder_sha256", "preprocessing"]  # all three must agree before scores may be compared
KEY = ["metric", "base_model", "method", "variant", *CELL]  # what makes a row the only one of its kind

SUMMARY_COLUMNS: dict[str, str] = {
    "base_model": COLUMNS["base_model"].meaning,
    "concept": f"name of the concept, or {ALL_CONCEPTS!r}: the macro average over them",
    "method": COLUMNS["method"].meaning,
    "variant": COLUMNS["variant"].meaning,
    "metric": COLUMNS["metric"].meaning,
    "encoder": COLUMNS["encoder"].meaning,
    "mean": "mean over a prompt's pictures, then over prompts, then over concepts",
    "difference": f"the same mean, of the variant's score less the score of {FLOOR!r} on the same cell",
    "low": "lower end of the 95 % bootstrap interval",
    "high": "upper end of the 95 % bootstrap interval",
    "images": "how many pictures the mean is over",
    "prompts": "how many different prompts; 0 for real images",
    "concepts": "how many concepts",
    "unpaired": f"pictures left out because {FLOOR!r} has none on the same cell",
}


# -- making and checking --------------------------------------------------------------------------------------


def from_rows(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """A checked table of rows that name every column; columns that may be null may be left out."""
    rows = [dict(row) for row in rows]
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    if unknown:
        raise ValueError(f"a row of scores has no column {sorted(unknown)[0]!r}; the columns are {listed(COLUMNS)}")
    return checked(pl.DataFrame(rows, schema=SCHEMA, strict=True))


def checked(table: pl.DataFrame, where: str = "the table of scores") -> pl.DataFrame:
    """The same rows with columns and rows in their one order; equal tables become equal files.

    Raises:
        InputError: a column is missing, unknown or of another type, a value is null, NaN or no known metric,
            or two rows are about the same picture and metric.
    """
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise InputError(f"{where} has no column {missing[0]!r}; score the pictures again to make it anew")
    if unknown := [name for name in table.columns if name not in COLUMNS]:
        raise InputError(f"{where} has a column {unknown[0]!r} that no table of scores has")
    for name, column in COLUMNS.items():
        if table.schema[name] != column.dtype:
            raise InputError(f"{where}: column {name!r} holds {table.schema[name]}, where {column.dtype} is expected")
        if not column.nullable and table[name].null_count():
            raise InputError(f"{where}: column {name!r} is empty in row {first(table[name].is_null())}")
    if (wrong := ~table["score"].is_finite()).any():
        row = table.row(first(wrong), named=True)
        raise InputError(
            f"{where}: the {row['metric']} of {row['image']} is {row['score']}; "
            "a score that cannot be computed must be left out"
        )
    if (wrong := ~table["metric"].is_in(list(METRICS))).any():
        raise InputError(f"{where}: no metric is called {table['metric'][first(wrong)]!r}; known are {listed(METRICS)}")
    table = table.select(list(COLUMNS)).sort([*KEY, *ENCODER], nulls_last=False, maintain_order=True)
    if (twice := table.select([*KEY, *ENCODER]).is_duplicated()).any():
        row = table.row(first(twice), named=True)
        raise InputError(f"{where} has two {row['metric']} scores of {row['image']} by {row['encoder']!r}")
    return table


def first(mask: pl.Series) -> int:
    return int(mask.arg_true()[0])


def concatenate(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All rows together; a row that several tables share (each may carry the floor's) stands there once.

    Raises:
        InputError: one metric was measured by encoders that differ in name, weights or preprocessing, or two
            tables give different scores to the same picture.
    """
    if not tables:
        raise ValueError("there are no tables of scores to join")
    together = checked(pl.concat([checked(table) for table in tables]).unique(), "the joined table of scores")
    check_encoders(together)
    return together


def check_encoders(table: pl.DataFrame) -> None:
    """Raise unless each metric was measured in one way throughout, and say where two ways part."""
    for metric in METRICS:
        rows = table.filter(pl.col("metric") == metric)
        ways = rows.select(ENCODER).unique(maintain_order=True)
        if len(ways) > 1:
            one, other = ways.row(0, named=True), ways.row(1, named=True)
            parts = [
                f"{column} {short(one[column])!r} and {short(other[column])!r}"
                for column in ENCODER
                if one[column] != other[column]
            ]
            examples = [
                rows.filter([pl.col(column) == way[column] for column in ENCODER])["image"][0] for way in (one, other)
            ]
            raise InputError(
                f"these tables cannot be joined, for their {metric} was measured in different ways: {listed(parts)} "
                f"(for example {listed(examples)}); score all of them again with one encoder"
            )


def short(value: str) -> str:
    """A sha256 as its first 12 digits, enough to tell two apart; other words whole."""
    return value[:12] if len(value) == 64 and " " not in value else value


# -- on disk --------------------------------------------------------------------------------------------------


def write(table: pl.DataFrame, path: str | Path) -> None:
    """Check and write a table of scores, whole or not at all. Equal tables give the same bytes."""
    table = checked(table, "the table of scores to be written")
    write_parquet(table, path, {name: column.meaning for name, column in COLUMNS.items()})


def read(path: str | Path) -> pl.DataFrame:
    """A table of scores that `write` wrote, checked.

    Raises:
        InputError: there is no such file, or it is no table of scores.
    """
    return checked(read_parquet(path), str(path))


def write_summary(summary: pl.DataFrame, path: str | Path) -> None:
    """Write what `summarise` or `difference_from_floor` returned, with the meaning of its columns."""
    write_parquet(summary, path, {name: SUMMARY_COLUMNS[name] for name in summary.columns})


def write_parquet(table: pl.DataFrame, path: str | Path, meanings: Mapping[str, str]) -> None:
    """The meanings go into the file's metadata as "column:NAME", for whoever opens it without this program."""
    buffer = io.BytesIO()
    table.rechunk().write_parquet(
        buffer,
        row_group_size=max(len(table), 1),  # one group: its place in the file cannot depend on the threads
        metadata={f"column:{name}": meaning for name, meaning in meanings.items()},
    )
    write_bytes(Path(path), buffer.getvalue())


def read_parquet(path: str | Path) -> pl.DataFrame:
    if not Path(path).is_file():
        raise InputError(f"there is no table {path}")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error


def meanings_in(path: str | Path) -> dict[str, str]:
    """Column name to meaning, as stored in a file."""
    stored = pl.read_parquet_metadata(path)
    return {key.removeprefix("column:"): value for key, value in stored.items() if key.startswith("column:")}


# -- summaries ------------------------------------------------------------------------------------------------


def summarise(table: pl.DataFrame, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """Mean and 95 % interval of each variant and metric, per concept and over all of them.

    Means are macro averages: over a prompt's pictures, then over prompts, then over concepts. Intervals are
    percentile bootstrap intervals (Efron 1979) that resample cells (concept, prompt, image) as if they were
    independent. They tell how far these pictures settle the numbers for these concepts and prompts; how much
    other concepts would differ is more, and is not in them.

    Returns:
        the columns base_model, concept, method, variant, metric, encoder, mean, low, high, images, prompts,
        concepts; the last rows are those of ALL_CONCEPTS.
    """
    check_encoders(table := checked(table))
    rows = []
    for labels, group in groups(table, ["base_model", "method", "variant", "metric", "encoder"]):
        for concept, cells in per_concept_and_all(group):
            mean, low, high = interval(cells["score"].to_numpy(), macro_weights(cells), draws, seed)
            rows.append({**labels, "concept": concept, "mean": mean, "low": low, "high": high, **counts(cells)})
    return summary_of(rows, ["mean", "low", "high"], ["images", "prompts", "concepts"])


def difference_from_floor(table: pl.DataFrame, floor: str = FLOOR, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """What each variant adds to the floor, with a 95 % interval, per concept and over all of them.

    Paired: a picture's score less the floor's score on the same cell (concept, prompt_index, image_index) and base
    model, which shares prompt and first noise. Averages and intervals are those of `summarise`, over the
    differences; an interval that does not hold 0 shows a difference. Variants without any pair have no row.

    Raises:
        InputError: no row has the variant `floor`.
    """
    check_encoders(table := checked(table))
    is_floor = pl.col("variant") == floor
    if table.filter(is_floor).is_empty():
        raise InputError(
            f"the table has no variant {floor!r} to compare with; its variants are "
            f"{listed(table['variant'].unique().sort())}"
        )
    on = ["base_model", "metric", *CELL]
    floors = table.filter(is_floor).select(*on, pl.col("score").alias("floor_score"))
    # real images have no prompt, so nothing of theirs shares a cell with a drawn picture
    others = table.filter(~is_floor & pl.col("prompt_index").is_not_null()).join(
        floors, on=on, how="left", nulls_equal=True
    )
    rows = []
    for labels, group in groups(others, ["base_model", "method", "variant", "metric", "encoder"]):
        for concept, cells in per_concept_and_all(group):
            pairs = cells.drop_nulls("floor_score")
            if pairs.is_empty():
                continue
            differences = (pairs["score"] - pairs["floor_score"]).to_numpy()
            difference, low, high = interval(differences, macro_weights(pairs), draws, seed)
            numbers = {"difference": difference, "low": low, "high": high, "unpaired": len(cells) - len(pairs)}
            rows.append({**labels, "concept": concept, **numbers, **counts(pairs)})
    return summary_of(rows, ["difference", "low", "high"], ["images", "prompts", "concepts", "unpaired"])


def groups(table: pl.DataFrame, by: list[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    for key, group in table.group_by(by, maintain_order=True):
        yield dict(zip(by, key, strict=True)), group


def per_concept_and_all(group: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for labels, cells in groups(group, ["concept"]):
        yield labels["concept"], cells
    yield ALL_CONCEPTS, group


def counts(cells: pl.DataFrame) -> dict[str, int]:
    prompts = cells["prompt_index"].drop_nulls().n_unique()
    return {"images": len(cells), "prompts": prompts, "concepts": cells["concept"].n_unique()}


def summary_of(rows: list[dict[str, Any]], floats: list[str], integers: list[str]) -> pl.DataFrame:
    labels = ["base_model", "concept", "method", "variant", "metric", "encoder"]
    schema = (
        dict.fromkeys(labels, pl.String()) | dict.fromkeys(floats, pl.Float64()) | dict.fromkeys(integers, pl.Int64())
    )
    summary = pl.DataFrame(rows, schema=schema)
    return summary.sort(pl.col("concept") == ALL_CONCEPTS, "concept", "metric", maintain_order=True)


def macro_weights(cells: pl.DataFrame) -> np.ndarray:
    """(N,) weights that sum to 1 and turn a sum over cells into the macro average."""
    images = pl.len().over("concept", "prompt_index")
    prompts = pl.col("prompt_index").n_unique().over("concept")  # null counts as one: real images have no prompts
    concepts = pl.col("concept").n_unique()
    return cells.select((1 / (images * prompts * concepts)).alias("weight"))["weight"].to_numpy()


def interval(values: np.ndarray, weights: np.ndarray, draws: int, seed: int) -> tuple[float, float, float]:
    """Weighted mean, and the 2.5th and 97.5th percentile of the same over resampled cells.

    values, weights: (N,). A resampled mean is divided by the weights that were drawn, so a draw that takes more
    cells from one concept is still an average. The draws depend on N and the seed alone: two variants with the
    same cells are resampled alike. With one cell there is nothing to resample and both ends are the value itself.
    """
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    rows = max(1, 2_000_000 // len(values))  # at most this many indices in memory at once
    for start in range(0, draws, rows):
        drawn = generator.integers(len(values), size=(min(rows, draws - start), len(values)))
        w = weights[drawn]
        means[start : start + len(drawn)] = (w * values[drawn]).sum(axis=1) / w.sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(weights @ values / weights.sum()), float(low), float(high)
