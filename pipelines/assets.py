"""What the pipeline makes, from photographs to the comparison. Each body calls one step of the core and reports.

The core is imported inside the bodies: definitions then load without torch. Annotations are evaluated here, against
the habit of the other files: Dagster looks at the type of `context` itself. That concept x method depends on the same
concept, Dagster infers from the partitions.
"""

import dagster as dg

from pipelines import checks, metadata, settings
from pipelines.conditions import AFTER_SCORES, WITH_COMPARISON
from pipelines.failures import sorted_out
from pipelines.lineage import behind
from pipelines.partitions import concept_and_method, concept_of, concepts, method_of
from pipelines.progress import logged
from pipelines.resources import Workspace

GPU = "gpu"  # the pool that holds one run per graphics card
OWNERS = ["team:personalize"]


concept_images = dg.AssetSpec(
    "concept_images",
    description="The concept's photographs and its description in `data/concepts`, as a person put them there. "
    "The sensor `concept_folder` reports them.",
    partitions_def=concepts,
    group_name="data",
    kinds={"image"},
    owners=OWNERS,
    tags={"layer": "source"},
)


@dg.asset(
    partitions_def=concepts,
    deps=[concept_images],
    pool=GPU,
    group_name="data",
    kinds={"pytorch"},
    owners=OWNERS,
    tags={"layer": "prepared"},
    check_specs=checks.of("latents"),
)
@sorted_out
def latents(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The photographs as the base model's autoencoder sees them, every crop and flip that training may draw."""
    from personalize_core import steps

    store, concept = workspace.store(), concept_of(context)
    report = steps.encode_images(store, concept, logged(context))
    shown = behind(store, report, concept_images=store.concept_folder(concept))
    return checks.with_gates(metadata.result(report, shown), steps.gates.latents(store, concept))


@dg.asset(
    partitions_def=concepts,
    deps=[concept_images],
    pool=GPU,
    group_name="data",
    kinds={"pytorch"},
    owners=OWNERS,
    tags={"layer": "prepared"},
)
@sorted_out
def class_images(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The base model's own pictures of the class noun, for prior preservation; concepts with one noun share them."""
    from personalize_core import steps

    store = workspace.store()
    class_noun = store.concept(concept_of(context)).class_noun
    report = steps.make_class_images(store, class_noun, logged(context))
    return metadata.result(report, behind(store, report))


@dg.asset(
    partitions_def=concept_and_method,
    deps=[latents, class_images, settings.recipe],
    pool=GPU,
    group_name="learning",
    kinds={"pytorch"},
    owners=OWNERS,
    tags={"layer": "learned"},
    check_specs=checks.of("artifact"),
)
@sorted_out
def artifact(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """What one method learned about one concept."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    version = steps.recipe_stamp(store, method)
    report = steps.train(store, concept, method, logged(context))
    shown = metadata.loss_curve(report) | behind(store, report, latents=store.latents(concept))
    result = checks.with_gates(metadata.result(report, shown), steps.gates.artifact(store, concept, method))
    return settings.made_with(context.instance, result, settings.recipe, method, version)


@dg.asset(
    partitions_def=concept_and_method,
    deps=[artifact, settings.sampling],
    pool=GPU,
    group_name="learning",
    kinds={"pytorch", "image"},
    owners=OWNERS,
    tags={"layer": "drawn"},
    check_specs=checks.of("image_grid"),
)
@sorted_out
def image_grid(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The concept in new scenes: rows are the method's variants, columns the prompts."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    version = steps.sampling_stamp(store, method)
    report = steps.draw_grid(store, concept, method, logged(context))
    shown = behind(store, report, artifact=store.artifact(method, concept))
    result = checks.with_gates(metadata.result(report, shown), steps.gates.grid(store, concept, method))
    return settings.made_with(context.instance, result, settings.sampling, method, version)


@dg.asset(
    partitions_def=concept_and_method,
    deps=[concept_images, image_grid, settings.encoders],
    pool=GPU,
    group_name="evaluation",
    kinds={"polars", "parquet"},
    owners=OWNERS,
    tags={"layer": "measured"},
    check_specs=checks.of("metrics"),
)
@sorted_out
def metrics(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The score of every picture: likeness to the concept and to the text."""
    from personalize_core import steps

    store, concept, method = workspace.store(), concept_of(context), method_of(context)
    version = steps.scoring_stamp(store)
    report = steps.score(store, concept, method, logged(context))
    inputs = {"concept_images": store.concept_folder(concept), "image_grid": store.grid(method, concept)}
    shown = metadata.scores_by_prompt(report) | behind(store, report, **inputs)
    found = [*steps.gates.scores(store, concept, method), *steps.gates.identity(store, concept, method)]
    result = checks.with_gates(metadata.result(report, shown), found)
    return settings.made_with(context.instance, result, settings.encoders, None, version)


@dg.asset(
    partitions_def=concepts,
    deps=[concept_images],
    pool=GPU,
    group_name="evaluation",
    kinds={"polars", "parquet"},
    owners=OWNERS,
    tags={"layer": "measured"},
    check_specs=checks.of("reference_scores"),
)
@sorted_out
def reference_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """How alike the concept's own photographs are to each other: the ceiling of likeness."""
    from personalize_core import steps
    from personalize_core.store import REFERENCES

    store, concept = workspace.store(), concept_of(context)
    report = steps.score_references(store, concept, logged(context))
    shown = behind(store, report, concept_images=store.concept_folder(concept))
    return checks.with_gates(metadata.result(report, shown), steps.gates.scores(store, concept, REFERENCES))


@dg.asset(
    deps=[metrics, reference_scores, image_grid],
    automation_condition=AFTER_SCORES,
    group_name="evaluation",
    kinds={"polars", "image"},
    owners=OWNERS,
    tags={"layer": "compared"},
    check_specs=checks.of("comparison"),
)
@sorted_out
def comparison(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Every method beside every other: one table of all scores, one grid, one plot of identity against text."""
    from personalize_core import steps

    store = workspace.store()
    report = steps.compare(store, logged(context))
    shown = metadata.overview(report, behind(store, report, metrics=store.drawn / "metrics"))
    return checks.with_gates(shown, steps.gates.comparison(store))


@dg.asset(
    deps=[comparison, artifact, image_grid],
    automation_condition=WITH_COMPARISON,
    group_name="evaluation",
    kinds={"html"},
    owners=OWNERS,
    tags={"layer": "compared"},
)
@sorted_out
def report(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The comparison in words, figures, pictures and tables: one page that needs nothing else."""
    from personalize_core import steps

    store = workspace.store()
    made = steps.report(store, logged(context))
    return metadata.overview(made, behind(store, made, comparison=store.comparison()))


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
