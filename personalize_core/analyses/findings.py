"""What an analysis returns: metrics, tables and images; or why it is not defined for a method or a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.metrics.parquet import write_parquet


class NotDefined(Exception):
    """An analysis says nothing about this method or concept; the message, a sentence, says why."""


@dataclass
class Findings:
    """Of one analysis, filled while it writes into `folder`.

    Attributes:
        title: as a heading.
        how: how the metrics were computed, and how to read them.
        metrics: by name; never NaN. What could not be computed is left out, with its reason in `absent`.
        absent: name -> why there is no such metric, table or image.
        images, tables: file name in the folder -> caption.
    """

    folder: Path
    title: str
    how: str
    metrics: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)

    def image(self, name: str, caption: str) -> Path:
        """Where to put an image."""
        self.images[name] = caption
        return self.folder / name

    def table(self, name: str, rows: Sequence[Mapping[str, object]], meanings: Mapping[str, str], caption: str) -> None:
        """Write rows as a Parquet file whose metadata say what each column means.

        Raises:
            ValueError: a row has other columns than `meanings`, or a number that is not finite.
        """
        for row in rows:
            if set(row) != set(meanings):
                raise ValueError(f"a row of {name} has the columns {sorted(row)}, not {sorted(meanings)}")
        frame = pl.DataFrame([dict(row) for row in rows], infer_schema_length=None).select(list(meanings))
        for column in frame.select(pl.col(pl.Float64)).iter_columns():
            if not column.drop_nulls().is_finite().all():
                raise ValueError(f"{name}: column {column.name!r} holds a number that is not finite")
        write_parquet(frame, self.folder / name, meanings)
        self.tables[name] = caption

    def described(self) -> dict[str, Any]:
        """For analyses.json."""
        return {
            "title": self.title,
            "how": self.how,
            "metrics": self.metrics,
            "absent": self.absent,
            "images": [{"file": name, "caption": caption} for name, caption in self.images.items()],
            "tables": [{"file": name, "caption": caption} for name, caption in self.tables.items()],
        }

    def not_defined(self, reason: str) -> dict[str, Any]:
        """The same, where the analysis says nothing about this method or concept.

        Raises:
            RuntimeError: it wrote something first, a mistake in its order.
        """
        if self.images or self.tables:
            raise RuntimeError(f"{self.title} wrote files before it knew that it is not defined")
        return {"title": self.title, "how": self.how, "not_defined": reason}
