"""What the pipeline makes, from concept images to the comparison. Each body calls one step of the core and reports.

The core is imported inside the bodies: definitions then load without torch. Annotations are evaluated here, against
the habit of the other files: Dagster looks at the type of `context` itself. That concept x method depends on the same
concept, Dagster infers from the partitions.
"""

from datetime import timedelta

import dagster as dg

from pipelines import asset_defaults, checks, metadata, settings
from pipelines.conditions import AFTER_SCORES, WITH_COMPARISON
from pipelines.lineage import behind
from pipelines.partitions import concept_and_method, concept_of, concepts, method_of
from pipelines.progress import logged
from pipelines.resources import Workspace

# Compared anew whenever scores change; so an old comparison says that nothing was scored, or that comparing fails.
COMPARED_LATELY = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=30), warn_window=timedelta(days=8))

concept_images = asset_defaults.source(
    "concept_images",
    group="data",
    kinds={"image"},
    partitions_def=concepts,
    description="The concept's images and its description in `data/concepts`, as a person put them there. "
    "The sensor `concept_folder` reports them.",
)


@asset_defaults.asset(
    group="data",
    layer="prepared",
    kinds={"pytorch"},
    partitions_def=concepts,
    deps=[concept_images],
    pool=asset_defaults.GPU,
    check_specs=checks.of("latents"),
)
def latents(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The concept images as the base model's autoencoder sees them, every crop and flip that training may sample."""
    from personalize_core import steps

    store, concept = workspace.store(), concept_of(context)
    report = steps.encode_images(store, concept, logged(context))
    shown = behind(store, report, concept_images=store.concept_folder(concept))
    return checks.with_gates(metadata.result(context, report, shown), steps.result_checks.latents(store, concept))


@asset_defaults.asset(
    group="data",
    layer="prepared",
    kinds={"pytorch"},
    partitions_def=concepts,
    deps=[concept_images],
    pool=asset_defaults.GPU,
)
def class_images(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The base model's own images of the class noun, for prior preservation; concepts with one noun share them."""
    from personalize_core import steps

    store = workspace.store()
    class_noun = store.concept(concept_of(context)).class_noun
    report = steps.make_class_images(store, class_noun, logged(context))
    return metadata.result(context, report, behind(store, report))


@asset_defaults.asset(
    group="learning",
    layer="learned",
    kinds={"pytorch"},
    partitions_def=concept_and_method,
    deps=[latents, class_images, settings.recipe],
    pool=asset_defaults.GPU,
    check_specs=checks.of("artifact"),
)
def artifact(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """What one method learned about one concept."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    steps.check_inputs(store, [concept], [method])
    if notice := steps.long_work_notice(store, steps.plan(store, [concept], [method])):
        context.log.warning(notice)
    version = steps.recipe_stamp(store, method)
    report = steps.train(store, concept, method, logged(context))
    shown = metadata.loss_curve(report) | behind(store, report, latents=store.latents(concept))
    result = checks.with_gates(
        metadata.result(context, report, shown), steps.result_checks.artifact(store, concept, method)
    )
    return settings.made_with(context.instance, result, settings.recipe, method, version)


@asset_defaults.asset(
    group="learning",
    layer="sampled",
    kinds={"pytorch", "image"},
    partitions_def=concept_and_method,
    deps=[artifact, settings.sampling],
    pool=asset_defaults.GPU,
    check_specs=checks.of("image_grid"),
)
def image_grid(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The concept in new scenes: rows are the method's variants, columns the prompts."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    version = steps.sampling_stamp(store, method)
    report = steps.sample_grid(store, concept, method, logged(context))
    shown = behind(store, report, artifact=store.artifact(method, concept))
    result = checks.with_gates(
        metadata.result(context, report, shown), steps.result_checks.grid(store, concept, method)
    )
    return settings.made_with(context.instance, result, settings.sampling, method, version)


@asset_defaults.asset(
    group="evaluation",
    layer="measured",
    kinds={"polars", "parquet"},
    partitions_def=concept_and_method,
    deps=[concept_images, image_grid, settings.encoders],
    pool=asset_defaults.GPU,
    check_specs=checks.of("metrics"),
)
def metrics(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The score of every image: likeness to the concept and to the text."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    version = steps.scoring_stamp(store)
    report = steps.score(store, concept, method, logged(context))
    inputs = {"concept_images": store.concept_folder(concept), "image_grid": store.grid(method, concept)}
    shown = metadata.scores_by_prompt(report) | behind(store, report, **inputs)
    found = [*steps.result_checks.scores(store, concept, method), *steps.result_checks.identity(store, concept, method)]
    result = checks.with_gates(metadata.result(context, report, shown), found)
    return settings.made_with(context.instance, result, settings.encoders, None, version)


@asset_defaults.asset(
    group="evaluation",
    layer="measured",
    kinds={"polars", "parquet"},
    partitions_def=concepts,
    deps=[concept_images],
    pool=asset_defaults.GPU,
    check_specs=checks.of("reference_scores"),
)
def reference_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """How alike the concept's own concept images are to each other: the ceiling of likeness."""
    from personalize_core import steps
    from personalize_core.workspace.store import REFERENCES

    store, concept = workspace.store(), concept_of(context)
    report = steps.score_references(store, concept, logged(context))
    shown = behind(store, report, concept_images=store.concept_folder(concept))
    return checks.with_gates(
        metadata.result(context, report, shown), steps.result_checks.scores(store, concept, REFERENCES)
    )


@asset_defaults.asset(
    group="evaluation",
    layer="compared",
    kinds={"polars", "image"},
    deps=[metrics, reference_scores, image_grid, dg.AssetKey("external_metrics")],  # pipelines/external.py
    automation_condition=AFTER_SCORES,
    freshness_policy=COMPARED_LATELY,
    check_specs=checks.of("comparison"),
)
def comparison(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Every method beside every other: one table of all scores, one grid, one plot of identity against text."""
    from personalize_core import steps

    store = workspace.store()
    report = steps.compare(store, logged(context))
    shown = metadata.overview(context, report, behind(store, report, metrics=store.sampled / "metrics"))
    return checks.with_gates(shown, steps.result_checks.comparison(store))


@asset_defaults.asset(
    group="evaluation",
    layer="compared",
    kinds={"html"},
    deps=[comparison, artifact, image_grid],
    automation_condition=WITH_COMPARISON,
    freshness_policy=COMPARED_LATELY,
)
def report(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The comparison in words, figures, images and tables: one page that needs nothing else."""
    from personalize_core import steps

    store = workspace.store()
    made = steps.report(store, logged(context))
    return metadata.overview(context, made, behind(store, made, comparison=store.comparison()))


ALL = [
    *settings.ALL,
    concept_images,
    latents,
    class_images,
    artifact,
    image_grid,
    metrics,
    reference_scores,
    comparison,
    report,
]
