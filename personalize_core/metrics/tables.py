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

import polars as pl

from personalize_core.errors import InputError, listed
from personalize_core.files import write_bytes
from personalize_core.metrics import statistics
from personalize_core.metrics.statistics import DRAWS, Estimate

FLOOR = "base_model"  # the variant that learned nothing
CEILING = "real_images"  # method and variant of the rows that compare the real images with each other
ALL_CONCEPTS = "all concepts"  # in a summary; no concept can be called so, for names have no spaces

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
    "difference": f"the same mean, of the variant's score less the score of {FLOOR!r} on the same cell and prompt",
    "low": "lower end of the 95 % interval; null where nothing was repeated, so that nothing is known",
    "high": "upper end of the 95 % interval; null where nothing was repeated",
    "error": "standard error of the mean; null where nothing was repeated",
    "freedom": "degrees of freedom of the standard error: with few, the interval is many standard errors wide",
    "over": (
        "what the interval lets vary; what is not named is held fixed: 'prompts' is about these concepts alone (one "
        "or two), 'pictures' about these concepts in one prompt; null where nothing was repeated"
    ),
    "images": "how many pictures the mean is over",
    "prompts": "how many different prompts; 0 for real images",
    "concepts": "how many concepts",
    "unpaired": f"pictures left out because {FLOOR!r} has none on the same cell and prompt",
}

SPREAD: dict[str, pl.DataType] = {  # what a summary says of an Estimate, besides its mean
    "low": pl.Float64(),
    "high": pl.Float64(),
    "error": pl.Float64(),
    "freedom": pl.Float64(),
    "over": pl.String(),
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


def write_summary(summary: pl.DataFrame, path: str | Path, more: Mapping[str, str] | None = None) -> None:
    """Write what `summarise` or `difference_from_floor` returned, with the meaning of its columns.

    more: the meaning of columns that were put beside them.
    """
    meanings = SUMMARY_COLUMNS | dict(more or {})
    write_parquet(summary, path, {name: meanings[name] for name in summary.columns})


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

    Means are macro averages: over a prompt's pictures, then over prompts, then over concepts. Intervals are those of
    `statistics.estimate`. Over three concepts or more they tell how other concepts and other prompts of the kind would
    come out; for one or two, how other prompts would, of these. A prompt is its text, wherever it stands in its list.
    Photographs of one or two concepts, compared with each other, have the interval of `statistics.of_pairs`.

    Returns:
        the columns base_model, concept, method, variant, metric, encoder, mean, low, high, error, freedom, over,
        images, prompts, concepts; the last rows are those of ALL_CONCEPTS.
    """
    check_encoders(table := checked(table))
    rows = []
    for labels, group in groups(with_prompts(table), ["base_model", "method", "variant", "metric", "encoder"]):
        for concept, cells in per_concept_and_all(group):
            if labels["method"] == CEILING and cells["concept"].n_unique() < statistics.FEWEST_CONCEPTS:
                found = statistics.of_pairs([own["score"].to_numpy() for _, own in groups(cells, ["concept"])])
            else:
                found = estimate_of(cells, "score", draws, seed)
            rows.append({**labels, "concept": concept, "mean": found.mean, **spread(found), **counts(cells)})
    return summary_of(rows, "mean", ["images", "prompts", "concepts"])


def difference_from_floor(table: pl.DataFrame, floor: str = FLOOR, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """What each variant adds to the floor, with a 95 % interval, per concept and over all of them.

    Paired: a picture's score less the floor's score on the same cell (concept, prompt_index, image_index) and base
    model, which shares prompt and first noise. Averages and intervals are those of `summarise`, over the
    differences; an interval that does not hold 0 shows a difference. Each stands alone: `ranking` corrects for
    looking at many. Variants without any pair have no row.

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
    # pictures of two prompts are no pair, whatever their place in their lists
    on = ["base_model", "metric", *CELL, "prompt_number"]
    # real images have no prompt, so nothing of theirs shares a cell with a drawn picture
    drawn = with_prompts(table.filter(pl.col("prompt_index").is_not_null()), "image_index")
    floors = drawn.filter(is_floor).select(*on, pl.col("score").alias("floor_score"))
    others = drawn.filter(~is_floor).join(floors, on=on, how="left", nulls_equal=True, maintain_order="left")
    others = others.with_columns(difference=pl.col("score") - pl.col("floor_score"))
    rows = []
    for labels, group in groups(others, ["base_model", "method", "variant", "metric", "encoder"]):
        for concept, cells in per_concept_and_all(group):
            pairs = cells.drop_nulls("difference")
            if pairs.is_empty():
                continue
            found = estimate_of(pairs, "difference", draws, seed)
            numbers = {"difference": found.mean, **spread(found), "unpaired": len(cells) - len(pairs)}
            rows.append({**labels, "concept": concept, **numbers, **counts(pairs)})
    return summary_of(rows, "difference", ["images", "prompts", "concepts", "unpaired"])


def with_prompts(table: pl.DataFrame, *also: str) -> pl.DataFrame:
    """What the statistics need of a table, with numbers for its prompts: equal texts are one prompt, -1 is none."""
    text = pl.coalesce("prompt", pl.col("prompt_index").cast(pl.String))
    number = (text.rank("dense").cast(pl.Int64) - 1).fill_null(-1).alias("prompt_number")
    needed = ["base_model", "method", "variant", "metric", "encoder", "concept", "prompt_index", *also, "score"]
    return table.select(*needed, number)


def estimate_of(cells: pl.DataFrame, column: str, draws: int, seed: int) -> Estimate:
    concepts = cells["concept"].rank("dense").to_numpy()
    values = cells[column].to_numpy()
    return statistics.estimate(concepts, cells["prompt_number"].to_numpy(), values, draws=draws, seed=seed)


def spread(found: Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SPREAD}


def groups(table: pl.DataFrame, by: list[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    for key, group in table.group_by(by, maintain_order=True):
        yield dict(zip(by, key, strict=True)), group


def per_concept_and_all(group: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for labels, cells in groups(group, ["concept"]):
        yield labels["concept"], cells
    yield ALL_CONCEPTS, group


def counts(cells: pl.DataFrame) -> dict[str, int]:
    prompts = cells.filter(pl.col("prompt_number") >= 0)["prompt_number"].n_unique()
    return {"images": len(cells), "prompts": prompts, "concepts": cells["concept"].n_unique()}


def summary_of(rows: list[dict[str, Any]], number: str, integers: list[str]) -> pl.DataFrame:
    labels = ["base_model", "concept", "method", "variant", "metric", "encoder"]
    schema = dict.fromkeys(labels, pl.String()) | {number: pl.Float64()} | SPREAD
    summary = pl.DataFrame(rows, schema=schema | dict.fromkeys(integers, pl.Int64()))
    return summary.sort(pl.col("concept") == ALL_CONCEPTS, "concept", "metric", maintain_order=True)
