"""What is behind numbers of a table of scores: how each was measured, and the images that it is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.errors import InputError, listed
from personalize_core.steps.result_lineage import DEEP, ResultLineage
from personalize_core.workspace.lineage.link import Link
from personalize_core.workspace.store import REFERENCES

if TYPE_CHECKING:
    import polars as pl

COLUMNS = {"prompt": "prompt_index", "image": "image_index"}  # of a table, where they are not called as rows have it
MEASURED = ("metric", "encoder", "variant")
HOW = ("encoder_sha256", "preprocessing", "text", "scaling", "pairing", "references", "mask")
ABOUT = ("method", "concept", "image", "image_sha256", "score")


@dataclass(frozen=True)
class Rows:
    """Which rows of a table of scores; None: all of them."""

    concept: str | None = None
    method: str | None = None
    variant: str | None = None
    prompt: int | None = None
    image: int | None = None
    metric: str | None = None

    @property
    def asked(self) -> dict[str, str | int]:
        """What they must have, by the table's columns."""
        return {COLUMNS.get(name, name): value for name, value in vars(self).items() if value is not None}

    @property
    def within_a_cell(self) -> bool:
        """Do they ask for less than all of a concept and method?"""
        return bool(self.asked.keys() - {"concept", "method"})


def explain_scores(chain: ResultLineage, path: Path, rows: Rows) -> Link:
    """The rows of the table at `path`, and the chain behind them.

    Raises:
        InputError: it is no table of scores, or has no such rows.
    """
    store, found = chain.store, _rows_of(path, rows)
    link = Link("metrics", chain.short(path), {"rows": len(found)})
    link.facts["scores"] = [
        {
            **dict(zip(MEASURED, names, strict=True)),
            "mean": float(group["score"].to_numpy().mean()),
            "images": len(group),
            **_same_in_all(group),
        }
        for names, group in found.group_by(MEASURED, maintain_order=True)
    ]
    images = found.select("image", "image_sha256").unique(maintain_order=True).rows()
    cells = found.select("method", "concept").unique(maintain_order=True).rows()
    if len(images) == 1 and cells[0][0] != REFERENCES:
        (name, digest), (method, concept) = images[0], cells[0]
        image = chain.file_in(chain.grid(method, concept), store.root / name)
        if image.facts.get("sha256") not in (None, digest):
            link.problems.append(f"{name} is another image now than the one that was scored")
        link.inputs.append(image)
    link.inputs += [chain.scores(*cell, deep=len(cells) <= DEEP) for cell in cells]
    if store.comparison() in path.parents:
        compared = chain.comparison()
        compared.inputs = []
        link.inputs.append(compared)
    return link


def _rows_of(path: Path, rows: Rows) -> pl.DataFrame:
    import polars as pl

    from personalize_core.metrics import parquet

    try:
        table = parquet.read_parquet(path)
    except Exception as error:  # polars and pyarrow raise what they like
        raise InputError(f"{path} is no table of scores: {error}") from None
    if lacking := {*rows.asked, *MEASURED, *HOW, *ABOUT} - set(table.columns):
        raise InputError(f"{path} is no table of scores: it has no column {listed(sorted(lacking))}")
    found = table.filter(*(pl.col(name) == value for name, value in rows.asked.items()))
    if found.is_empty():
        there = "; ".join(f"{name}: {listed(sorted(map(str, table[name].unique())))}" for name in rows.asked)
        raise InputError(f"{path} has no such row; it has {there}")
    return found


def _same_in_all(group: pl.DataFrame) -> dict[str, str]:
    """How they were measured, as far as all rows agree in it."""
    return {name: group[name][0] for name in HOW if group[name].n_unique() == 1 and group[name][0] is not None}
