"""Published scores, beside ours only where both were measured under one contract; else, what differs.

published_results.csv holds scores of published tables with their citations; contracts.yaml, how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import polars as pl
import yaml

from personalize_core.metrics.tables import ALL_CONCEPTS, ALL_IMAGES, CEILING
from personalize_core.report.evidence import Evidence

TEXT = "class phrase"  # what CLIP-T compares an image with, here: the prompt with the class noun for the concept
AVERAGE = "over prompts, then concepts"
RESULTS, CONTRACTS = "published_results.csv", "contracts.yaml"


@dataclass(frozen=True)
class Ours:
    """How one metric of this comparison was measured, and what came out."""

    base_model: str
    protocol: str | None
    concepts: int
    prompts: int  # the most that a concept has
    images_per_prompt: int
    means: Mapping[tuple[str, str, str], tuple[float, float | None, float | None]]
    """(variant, metric, encoder) -> mean, low, high."""
    references: Mapping[str, str] = field(default_factory=dict)  # metric -> which concept images it compares with

    def encoders(self, metric: str) -> list[str]:
        return sorted({encoder for _, measured, encoder in self.means if measured == metric})

    @classmethod
    def of(cls, evidence: Evidence) -> Ours:
        sampled = evidence.scores.filter(pl.col("method") != CEILING)
        by_concept = sampled.group_by("concept").agg(pl.col("prompt").n_unique())
        by_prompt = sampled.group_by("concept", "variant", "prompt_index").agg(pl.col("image_index").n_unique())
        overall = evidence.every_mean.filter(concept=ALL_CONCEPTS)
        return cls(
            base_model=evidence.base_model,
            protocol=evidence.protocol,
            concepts=len(by_concept),
            prompts=int(by_concept["prompt"].to_numpy().max()),
            images_per_prompt=int(by_prompt["image_index"].to_numpy().max()),
            means={
                (row["variant"], row["metric"], row["encoder"]): (row["mean"], row["low"], row["high"])
                for row in overall.iter_rows(named=True)
            },
            references=dict(
                evidence.every_score.drop_nulls("references").select("metric", "references").unique().iter_rows()
            ),
        )


@dataclass(frozen=True)
class Beside:
    """A published score, and ours if the contracts match."""

    paper: str
    table: str
    method: str
    metric: str
    value: str
    differs: Sequence[str]  # empty where the contracts match
    mean: float | None = None
    low: float | None = None
    high: float | None = None


def beside(ours: Ours) -> list[Beside]:
    """Every published score whose metric we know, with ours where nothing differs."""
    found = []
    for row in results().iter_rows(named=True):
        contract = _contract(row)
        if contract is None or row["metric"] not in contract["metrics"]:
            continue
        differs = differences(contract, row, ours)
        variant, measured = contract["methods"].get(row["method"]), contract["metrics"][row["metric"]]
        which = (variant, measured["metric"], measured["encoder"])
        measured_here = ours.means.get(which) if not differs else None
        mean, low, high = measured_here or (None, None, None)
        found.append(
            Beside(row["paper"], row["table"], row["method"], row["metric"], row["value"], differs, mean, low, high)
        )
    return found


def differences(contract: Mapping[str, Any], row: Mapping[str, Any], ours: Ours) -> list[str]:
    """What differs between the contract of a published score and ours, or is not stated; empty if they agree."""
    measured, encoders = contract["metrics"][row["metric"]], ours.encoders(contract["metrics"][row["metric"]]["metric"])
    there = measured["encoder"]
    pairs = {
        "base model": (contract["base_models"].get(row["base_model"], row["base_model"]), ours.base_model),
        "protocol": (contract["protocol"], ours.protocol or "none"),
        "concepts": (contract["concepts"], ours.concepts),
        "prompts": (contract["prompts"], ours.prompts),
        "images of a prompt": (contract["images_per_prompt"], ours.images_per_prompt),
        f"encoder of {measured['metric']}": (there, there if there in encoders else " and ".join(encoders) or "none"),
        "average": (contract.get("average", AVERAGE), AVERAGE),
    }
    pairs["concept images"] = (ALL_IMAGES, ours.references.get(measured["metric"], ALL_IMAGES))
    if measured["metric"].startswith("clip_t"):
        pairs["text"] = (contract["text"], TEXT)
    return [
        f"{what}: not stated there" if there is None else f"{what}: {there} there, {here} here"
        for what, (there, here) in pairs.items()
        if there != here
    ]


def in_short(rows: Sequence[Beside]) -> list[tuple[str, str, list[str], str]]:
    """(paper, table, all that differs, what is uncertain), once for each table."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        known = found.setdefault((row.paper, row.table), [])
        known += [one for one in row.differs if one not in known]
    uncertain = {contract["paper"]: contract["uncertain"] for contract in contracts()}
    return [(paper, table, differs, uncertain[paper]) for (paper, table), differs in found.items()]


def results() -> pl.DataFrame:
    """paper, table, method, base_model, dataset, metric, value (as it is printed there)."""
    return pl.read_csv(_packaged(RESULTS).encode(), infer_schema=False)


@cache
def contracts() -> list[dict[str, Any]]:
    return yaml.safe_load(_packaged(CONTRACTS))


def _contract(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """None for tables that no contract is known of, and for what is no score of images, as studies with people."""
    for contract in contracts():
        if contract["paper"] == row["paper"] and row["table"].startswith(tuple(contract["tables"])):
            return contract
    return None


def _packaged(name: str) -> str:
    return files("personalize_core.report").joinpath(name).read_text(encoding="utf-8")
