"""What a person asks for beyond the scores. Nothing makes these by itself, and making them trains nothing.

As in chain.py, the bodies call steps of the core, and annotations are evaluated here.
"""

import dataclasses
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from pipelines.assets import asset_defaults, chain
from pipelines.assets.external import concept_and_label, external_metrics, label_of
from pipelines.partitions import concept_and_method, concept_of, concepts, method_of
from pipelines.presentation import metadata
from pipelines.presentation.lineage import behind
from pipelines.presentation.progress import logged
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.steps import Report
    from personalize_core.workspace.store import Store

MOST_IMAGES = 8  # in the page; the others lie at the asset's path


@asset_defaults.asset(
    group="analysis",
    layer="analysed",
    kinds={"pytorch", "image"},
    partitions_def=concept_and_method,
    deps=[chain.concept_images, chain.artifact, chain.image_grid, chain.metrics],
    pool=asset_defaults.GPU,
)
def analyses(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """What the headline hides, and the papers' analyses, of one method on one concept."""
    from personalize_core import steps

    store = workspace.store()
    return shown(context, store, steps.analyse(store, concept_of(context), method_of(context), logged(context)))


@asset_defaults.asset(
    group="analysis",
    layer="analysed",
    kinds={"pytorch", "image"},
    partitions_def=concept_and_label,
    deps=[chain.concept_images, external_metrics],
    pool=asset_defaults.GPU,
)
def external_analyses(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """What the headline hides of images made elsewhere: prompt by prompt, absence, copying, diversity."""
    from personalize_core import steps

    store = workspace.store()
    return shown(context, store, steps.analyse(store, concept_of(context), label_of(context), logged(context)))


@asset_defaults.asset(group="analysis", layer="analysed", kinds={"image"}, partitions_def=concepts, deps=[analyses])
def analyses_together(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """What became of the embeddings of all methods that were analysed on one concept, in one figure each."""
    from personalize_core import steps

    store, concept = workspace.store(), concept_of(context)
    return shown(context, store, steps.analyse_together(store, concept, steps.analysed(store, concept)))


class Nouns(dg.Config):
    """Where `class_nouns` chooses from."""

    nouns: str | None = Field(
        default=None,
        description="common: the few that come with the package; wordnet, or wordnet:LEXICON: what the package wn has "
        "installed; or a file with a noun a line. Left out: common with the mini world's encoder, else wordnet.",
    )


@asset_defaults.asset(
    group="analysis",
    layer="analysed",
    kinds={"pytorch", "parquet"},
    partitions_def=concepts,
    deps=[chain.concept_images],
    pool=asset_defaults.GPU,
)
def class_nouns(context: dg.AssetExecutionContext, config: Nouns, workspace: Workspace) -> dg.MaterializeResult:
    """The nouns that the text-image encoder finds most like a concept's images."""
    from personalize_core import steps

    store = workspace.store()
    return shown(context, store, steps.suggest_class(store, concept_of(context), config.nouns, logged(context)))


def shown(context: dg.AssetExecutionContext, store: "Store", report: "Report") -> dg.MaterializeResult:
    """The first images, and a table of all numbers with the reasons of those that there are not."""
    from personalize_core import steps
    from personalize_core.files.atomic import read_json

    found = read_json(report.path / steps.ANALYSES)
    rows = []
    for name in found.get("order", found["analyses"]):
        one = found["analyses"][name]
        told = one.get("metrics", {}) | one.get("absent", {})
        if "not_defined" in one:
            told = {"not defined": one["not_defined"]}
        rows += [(one["title"], what, f"{value:.4f}" if isinstance(value, float) else str(value))
                 for what, value in told.items()]  # fmt: skip
    names = ("analysis", "what", "value")
    table = dg.MetadataValue.table(
        [dg.TableRecord(dict(zip(names, row, strict=True))) for row in rows],
        schema=dg.TableSchema([dg.TableColumn(name) for name in names]),
    )
    images = {path.stem: path for path in list(report.images.values())[:MOST_IMAGES]}
    more = {"metrics": table} | behind(store, report)
    return metadata.result(context, store, dataclasses.replace(report, images=images, metrics={}), more)


ALL = [analyses, external_analyses, analyses_together, class_nouns]
