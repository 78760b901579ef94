"""Parquet files that say what each of their columns means."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from personalize_core.errors import InputError
from personalize_core.files.atomic import write_bytes


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
