"""All that a report shows, read from a workspace. What was not made is absent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import has_this_format, read_json, read_record, read_result
from personalize_core.methods import BASELINE, recipe_class
from personalize_core.metrics import parquet, tables
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.metrics.tables import ALL_CONCEPTS, CEILING
from personalize_core.report.comparison_in_words import COPYING
from personalize_core.sampling.grid import DESCRIPTION
from personalize_core.training import training_log
from personalize_core.training.probe_files import ENDED, PROBE_CURVES, PROBE_IMAGES, PROBES
from personalize_core.workspace.store import AGREEMENT, REFERENCES, SCORES, Store, is_label

IDENTITY, TEXT = "dino", "clip_t"  # what the plane shows and the verdict is about first
SHOWN = {IDENTITY: "DINO", TEXT: "CLIP-T", "clip_i": "CLIP-I"}
ASKED = {IDENTITY: "keeps the concept", "clip_i": "keeps the concept", TEXT: "follows the prompt"}
# Where no concept has images held out though some were asked for, those trained on take their place.
IN_PLACE = {name: tables.twin_of(name) for name in (IDENTITY, "clip_i")}
METRICS = SHOWN | {twin: f"{SHOWN[name]}, images trained on" for name, twin in IN_PLACE.items()}
ASKED |= {twin: ASKED[name] for name, twin in IN_PLACE.items()}


@dataclass(frozen=True)
class Shown:
    """An image about a method, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Learned:
    """What a method learned about one concept."""

    concept: str
    described: Mapping[str, Any]  # config.json
    log: Sequence[Mapping[str, Any]]  # a row per training step; empty if nothing was trained here
    fixed_batch: Mapping[str, Any] | None  # the loss on the same batch before and after
    watched: Sequence[Shown] = ()  # what was seen while it was trained
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # "steps", "of", "learned", "kept" of each
    probes: pl.DataFrame | None = None  # every value that was seen; None where none was


@dataclass(frozen=True)
class MethodTold:
    """A method as the report shows it."""

    name: str
    summary: str  # one line
    source: str  # its citation; empty for the base model
    published: Mapping[str, Any]  # option -> value of the published recipe
    variants: Sequence[str]
    learned: Sequence[Learned]
    heat_maps: Sequence[Shown]
    analyses: Mapping[str, Sequence[Analysis]]  # by concept

    @property
    def trained(self) -> bool:
        return any(one.log for one in self.learned)


@dataclass(frozen=True)
class Analysis:
    """One analysis of a method on a concept."""

    title: str
    how: str
    metrics: Mapping[str, Any]
    absent: Mapping[str, str]
    images: Sequence[Shown]


@dataclass(frozen=True)
class ConceptTold:
    name: str
    class_noun: str
    concept_images: Sequence[Path]  # all of them
    held_out: int | None  # how many of them were not trained on; None: no such thing was asked for


@dataclass(frozen=True)
class Evidence:
    """A comparison and what it is based on."""

    root: Path
    protocol: str | None
    base_model: str
    scores: pl.DataFrame  # by the first encoder of each list, as is everything below, unless it says otherwise
    every_score: pl.DataFrame
    summary: pl.DataFrame
    every_mean: pl.DataFrame
    pairs: pl.DataFrame  # by `metrics` alone, as is rank
    rank: pl.DataFrame
    differences: pl.DataFrame | None  # None where the base model was not scored
    missing: Sequence[str]  # METHOD/CONCEPT of the experiment without scores
    absent: Sequence[Mapping[str, Any]]  # scores that could not be computed, each with its reason
    concepts: Sequence[ConceptTold]
    methods: Sequence[MethodTold]
    sampling: Sequence[Mapping[str, Any]]  # the settings the images were sampled with; one, if all is well
    seeds: Sequence[int]
    copying: pl.DataFrame | None  # metrics/held_out.py; None where no image is held out
    agreement: pl.DataFrame | None  # of metrics with people; None where `personalize agreement` was not run
    people: Mapping[str, Any]  # whose answers those are; empty where there are none
    costs: Mapping[str, Mapping[str, Any]]  # variant -> what it cost on the mean of all concepts, as far as recorded
    variants: Sequence[str] = field(default=())  # the baseline first, without the real images
    baseline: str = BASELINE  # the variant that the others are compared with

    @property
    def external(self) -> bool:
        """Are there images that were made elsewhere?"""
        return self.scores["source"].null_count() < len(self.scores)

    def overall(self, metric: str) -> dict[str, dict[str, Any]]:
        """variant -> its row of the summary over all concepts."""
        rows = self.summary.filter(pl.col("concept") == ALL_CONCEPTS, pl.col("metric") == metric)
        return {row["variant"]: row for row in rows.iter_rows(named=True)}

    @property
    def agreement_file(self) -> Path:
        return Store(self.root, self.protocol).agreement() / AGREEMENT

    @property
    def coverage(self) -> ConceptCoverage:
        """Over how many concepts each variant's means are, by the metrics that are shown first."""
        return ConceptCoverage.of_summary(self.summary, self.metrics)

    @property
    def metrics(self) -> list[str]:
        """Those that are shown first."""
        return metrics_shown(self.scores)

    @property
    def identity(self) -> str:
        """The metric of identity that the plane shows and the verdict is about first."""
        return tables.shown(IDENTITY, set(self.scores["metric"]))


def read(store: Store) -> Evidence:
    """What the last comparison holds, and the artifacts, grids and concept images behind it.

    Raises:
        InputError: nothing has been compared, or its images are of several base models.
    """
    folder = store.comparison()
    if not (folder / SCORES).is_file():
        raise InputError(f"nothing has been compared in {folder}; `personalize compare` compares what was scored")
    every_score, every_mean = tables.read(folder / SCORES), parquet.read_parquet(folder / "summary.parquet")
    scores = headline(every_score)
    bases = sorted(scores["base_model"].drop_nulls().unique())
    if len(bases) != 1:
        raise InputError(
            f"{folder} compares images of the base models {', '.join(bases)}; a report is about one, so evaluate "
            "again what was sampled from another"
        )
    sampled = scores.filter(pl.col("method") != CEILING)
    names = sampled["variant"].unique().sort().to_list()
    cells = sampled.select("method", "concept").unique().sort("method", "concept").rows()
    grids = [read_record(store.grid(method, concept) / DESCRIPTION) for method, concept in cells]
    differences, copying = folder / "differences.parquet", folder / COPYING
    agreed = store.agreement() / AGREEMENT
    summarised = read_result(folder / "summary.json", missing=list, baseline=str)
    baseline, by_shown = summarised["baseline"], pl.col("metric").is_in(metrics_shown(scores))
    return Evidence(
        root=store.root,
        protocol=store.protocol,
        base_model=bases[0],
        scores=scores,
        every_score=every_score,
        summary=headline(every_mean),
        every_mean=every_mean,
        pairs=parquet.read_parquet(folder / "pairs.parquet").filter(by_shown),
        rank=parquet.read_parquet(folder / "rank.parquet").filter(by_shown),
        differences=headline(parquet.read_parquet(differences)) if differences.is_file() else None,
        missing=[name for name in summarised["missing"] if not _is_concept_images(name)],
        absent=_json(folder / "absent.json") or [],
        concepts=[_concept(store, name, sampled) for name in sorted(sampled["concept"].unique())],
        methods=[
            _method(store, method, sampled, cells) for method in _ordered({method for method, _ in cells}, baseline)
        ],
        sampling=_distinct(grid["sampling"] for grid in grids if "sampling" in grid),
        seeds=_distinct(grid["seed"] for grid in grids if "seed" in grid),
        copying=headline(parquet.read_parquet(copying)) if copying.is_file() else None,
        agreement=parquet.read_parquet(agreed) if agreed.is_file() else None,
        people=_json(agreed.with_suffix(".json")) or {},
        costs=_costs(store.costs()),
        variants=_ordered(names, baseline),
        baseline=baseline,
    )


def metrics_shown(scores: pl.DataFrame) -> list[str]:
    """Those of METRICS that were measured and are shown first: with the images held out, where there are some."""
    there = set(scores["metric"])
    return [name for metric in SHOWN if (name := tables.shown(metric, there)) in there]


def headline(table: pl.DataFrame) -> pl.DataFrame:
    """The rows by the first encoder of each list; all of them where there is no other."""
    return table.filter("headline") if "headline" in table.columns else table


def _ordered(names, baseline: str) -> list[str]:
    """The baseline first, then by name."""
    return sorted(names, key=lambda name: (name != baseline, name))


def _is_concept_images(cell: str) -> bool:
    return cell.startswith(f"{REFERENCES}/")  # a single concept image has no other to be compared with


def _distinct(values) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _concept(store: Store, name: str, sampled: pl.DataFrame) -> ConceptTold:
    described, images = store.concept(name), concept_files.concept_images(store.concept_folder(name))
    of_concept = sampled.filter(concept=name)
    held_out = of_concept.filter(references=tables.HELD_OUT)["pairs"].to_list()
    asked = bool(held_out) or tables.TRAINED_ON in set(of_concept["references"])
    return ConceptTold(name, described.class_noun, images, max(held_out, default=0) if asked else None)


def _method(store: Store, name: str, sampled: pl.DataFrame, cells: Sequence[tuple[str, str]]) -> MethodTold:
    concepts = [concept for method, concept in cells if method == name]
    if is_label(name):
        return _external(store, name, concepts)
    recipe = recipe_class(name)
    return MethodTold(
        name=name,
        summary=(inspect.getdoc(recipe) or "").split("\n\n")[0].replace("\n", " "),
        source=recipe.citation(),
        published={key: _plain(value) for key, value in vars(recipe()).items()},
        variants=sampled.filter(method=name)["variant"].unique().sort().to_list(),
        learned=[_learned(store.artifact(name, concept), concept) for concept in concepts],
        heat_maps=[one for concept in concepts for one in _heat_maps(store, name, concept)],
        analyses={concept: found for concept in concepts if (found := _analyses(store, name, concept))},
    )


def _external(store: Store, label: str, concepts: Sequence[str]) -> MethodTold:
    """An external column: of how its images were made, no more is known than what its description says."""
    grids = [read_record(store.grid(label, concept) / DESCRIPTION) for concept in concepts]
    about = [grid["external"] for grid in grids if "external" in grid]
    sources, layouts = (sorted({one[key] for one in about}) for key in ("source", "layout"))
    return MethodTold(
        name=label,
        summary=f"Images made elsewhere; what made them: {listed(sources)}; read by the layout {listed(layouts)}.",
        source="",
        published={},
        variants=[label],
        learned=[],
        heat_maps=[],
        analyses={concept: found for concept in concepts if (found := _analyses(store, label, concept))},
    )


def _learned(folder: Path, concept: str) -> Learned:
    log = training_log.read(folder) if (folder / training_log.LOG).is_file() else []
    shown = {
        PROBE_IMAGES: f"{concept}: images of the same noise, as it was learned",
        PROBE_CURVES: f"{concept}: the loss on inputs that stay the same, and what the images say; bands: a standard "
        "error of the change",
    }
    watched = [Shown(folder / name, caption) for name, caption in shown.items() if (folder / name).is_file()]
    stages = (_json(folder / ENDED) or {}).get("stages", {})
    described, fixed = _json(folder / "config.json") or {}, _json(folder / "fixed_batch.json")
    probes = parquet.read_parquet(folder / PROBES) if (folder / PROBES).is_file() else None
    return Learned(concept, described, log, fixed, watched, stages, probes)


def _heat_maps(store: Store, method: str, concept: str) -> list[Shown]:
    """Of `personalize heat-maps`; the newest are not known, so all are shown."""
    found = []
    for path in sorted(store.samples(method, concept, "any").parent.glob("*/heat_maps.json")):
        image = path.with_suffix(".png")
        if image.is_file() and has_this_format(path.parent):
            prompt = read_result(path, prompt=str)["prompt"]
            found.append(Shown(image, f"{concept}: where attention looked for each word of “{prompt}”"))
    return found


def _analyses(store: Store, method: str, concept: str) -> list[Analysis]:
    folder = store.analyses(method, concept)
    if not has_this_format(folder):  # none, or one of an earlier version
        return []
    described = read_result(folder / "analyses.json", analyses=dict, order=list)
    return [_analysis(folder, described["analyses"][name]) for name in described["order"]]


def _analysis(folder: Path, value: Mapping[str, Any]) -> Analysis:
    if "not_defined" in value:
        return Analysis(value["title"], value["how"], {}, {"not defined here": value["not_defined"]}, [])
    images = [Shown(folder / one["file"], one["caption"]) for one in value["images"]]
    return Analysis(value["title"], value["how"], value["metrics"], value["absent"], images)


def _costs(path: Path) -> dict[str, dict[str, Any]]:
    """Nothing where `compare` wrote no table: that of another machine may have stayed there."""
    rows = pl.read_parquet(path).filter(concept=ALL_CONCEPTS) if path.is_file() else pl.DataFrame()
    return {row["variant"]: row for row in rows.iter_rows(named=True)}


def _json(path: Path) -> Any:
    """None where there is no such file."""
    return read_json(path) if path.is_file() else None


def _plain(value: Any) -> Any:
    """As JSON would hold it, so that it can be compared with what an artifact holds."""
    return list(value) if isinstance(value, tuple) else value
