"""Over how many concepts each mean of a comparison is, where variants were not all scored on the same ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import polars as pl

from personalize_core.metrics.tables import ALL_CONCEPTS, CEILING


@dataclass(frozen=True)
class ConceptCoverage:
    """`total` concepts in all; `of` each variant the fewest and the most that one of its means is over."""

    total: int
    of: Mapping[str, tuple[int, int]]

    @classmethod
    def of_summary(cls, summary: pl.DataFrame, metrics: Collection[str]) -> ConceptCoverage:
        """By the scores that are shown: one beside them, such as a masked one, may lack a concept that they have.

        Args:
            summary: what summaries.summarise returned, or its headline.
            metrics: those that are shown together; of the others, nothing is said.
        """
        overall = summary.filter(pl.col("concept") == ALL_CONCEPTS, pl.col("metric").is_in(list(metrics)))
        names = set(summary["concept"]) - {ALL_CONCEPTS}
        counted = overall.group_by("variant").agg(
            pl.col("concepts").min().alias("fewest"), pl.col("concepts").max().alias("most")
        )
        found = {variant: (fewest, most) for variant, fewest, most in counted.sort("variant").iter_rows()}
        return cls(max([len(names), *(most for _, most in found.values())]), found)

    @property
    def whole(self) -> bool:
        """Does every mean of a variant, real images aside, stand for all concepts?"""
        return all(self.is_whole(variant) for variant in self.of if variant != CEILING)

    def is_whole(self, variant: str) -> bool:
        return self.of.get(variant, (0, 0)) == (self.total, self.total)

    def count(self, variant: str) -> str:
        """For a cell of a table: "5", or "5 to 7" where its means differ in it."""
        fewest, most = self.of[variant]
        return str(most) if fewest == most else f"{fewest} to {most}"

    def note(self, variant: str) -> str:
        """Behind a variant's name: "" where it is whole, else " (5 of 8 concepts)"."""
        return "" if self.is_whole(variant) else f" ({self.count(variant)} of {self.total} concepts)"
