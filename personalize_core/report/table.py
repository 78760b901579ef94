"""One table of a report: on the page for people, and as Parquet, CSV and LaTeX for whoever goes on with it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from tabulate import tabulate

from personalize_core.files.atomic import write_bytes
from personalize_core.metrics import parquet

NOT_RECORDED = "not recorded"
LONG = 44  # characters of a cell
NUMBER = re.compile(r"-?[\d,]+(\.\d+)?( (s|MB|kB|bytes|%))?( \[.*\]| \(.*\))?|\d+ to \d+")


@dataclass(frozen=True)
class Table:
    """One table in both forms."""

    name: str  # of its files
    title: str
    frame: pl.DataFrame  # what a program reads
    meanings: Mapping[str, str]  # column -> meaning, kept in the Parquet file
    shown: Sequence[Sequence[str]]  # what people read: a heading, then rows
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column: does it hold values, with or without units and intervals?"""
        columns = zip(*self.shown[1:], strict=True)
        empty = {"-", NOT_RECORDED}
        return [all(c in empty or NUMBER.fullmatch(c) for c in column) and set(column) != empty for column in columns]

    @property
    def long(self) -> list[bool]:
        """For each column: does it hold sentences, which want room?"""
        return [any(len(cell) > LONG for cell in column) for column in zip(*self.shown[1:], strict=True)]

    def write(self, folder: Path) -> None:
        """NAME.parquet and NAME.csv hold the values, NAME.tex the text of the page.

        In the CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
        """
        parquet.write_parquet(self.frame, folder / f"{self.name}.parquet", self.meanings)
        buffer = io.BytesIO()
        text = pl.col(pl.String)
        formula = text.str.contains(r"^(?:[=+@\t\r]|-[^\d.])")
        self.frame.with_columns(pl.when(formula).then("'" + text).otherwise(text).name.keep()).write_csv(buffer)
        write_bytes(folder / f"{self.name}.csv", buffer.getvalue())
        heading, *rows = self.shown
        latex = tabulate(rows, heading, tablefmt="latex_booktabs", disable_numparse=True)
        write_bytes(folder / f"{self.name}.tex", f"% {self.title}; needs \\usepackage{{booktabs}}\n{latex}\n".encode())
