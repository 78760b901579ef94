"""What the pipeline makes, from concept images to the comparison. The bodies call steps of the core and report.

The core is imported inside the bodies: definitions then load without torch. Annotations are evaluated here, against
the habit of the other files: Dagster looks at the type of `context` itself. That concept x method depends on the same
concept, Dagster infers from the partitions.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import dagster as dg

from pipelines.assets import asset_defaults, external, settings
from pipelines.assets.conditions import AFTER_SCORES, WITH_COMPARISON
from pipelines.assets.experiments import USUAL, Experiment, experiments
from pipelines.assets.outcomes import told
from pipelines.partitions import concept_and_method, concept_of, concepts, method_of
from pipelines.presentation.progress import logged
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
)
def latents(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The concept images as the base model's autoencoder sees them, every crop and flip that training may sample."""
    from personalize_core import steps

    store, concept = workspace.store(), concept_of(context)
    return told(context, store, "latents", steps.encode_images(store, concept, logged(context)), concept)


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

    store, concept = workspace.store(), concept_of(context)
    report = steps.make_class_images(store, store.concept(concept).class_noun, logged(context))
    return told(context, store, "class_images", report, concept)


def learned(experiment: Experiment) -> dg.AssetsDefinition:
    """The artifacts of one training; protocols have none of their own."""

    @asset_defaults.asset(
        experiment=experiment,
        group="learning",
        layer="learned",
        kinds={"pytorch"},
        partitions_def=concept_and_method,
        deps=[latents, class_images, settings.USUAL.recipe],
        pool=asset_defaults.GPU,
    )
    def artifact(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """What one method learned about one concept."""
        from personalize_core import steps

        store, concept, method = experiment.store(workspace), concept_of(context), method_of(context)
        steps.check_inputs(store, [concept], [method])
        if experiment.repeat:
            steps.check_repeatable(store.again(0), [concept], [method])
        if notice := steps.long_work_notice(store, steps.plan(store, [concept], [method])):
            context.log.warning(notice)
        version = steps.recipe_stamp(store, method)
        report = steps.train(store, concept, method, logged(context))
        result = told(context, store, "artifact", report, concept, method)
        return settings.made_with(context.instance, result, settings.USUAL.recipe, method, version)

    return artifact


@dataclass(frozen=True)
class Sampled:
    """What is made from artifacts, of one experiment."""

    image_grid: dg.AssetsDefinition
    metrics: dg.AssetsDefinition


def sampled(experiment: Experiment, artifact: dg.AssetsDefinition) -> Sampled:
    """Grids and their scores."""
    made_by = settings.of(experiment)

    @asset_defaults.asset(
        experiment=experiment,
        group="learning",
        layer="sampled",
        kinds={"pytorch", "image"},
        partitions_def=concept_and_method,
        deps=[artifact, made_by.sampling],
        pool=asset_defaults.GPU,
    )
    def image_grid(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """The concept in new scenes: rows are the method's variants, columns the prompts."""
        from personalize_core import steps

        store, concept, method = experiment.store(workspace), concept_of(context), method_of(context)
        version = steps.sampling_stamp(store, method)
        report = steps.sample_grid(store, concept, method, logged(context))
        result = told(context, store, "image_grid", report, concept, method)
        return settings.made_with(context.instance, result, made_by.sampling, method, version)

    @asset_defaults.asset(
        experiment=experiment,
        group="evaluation",
        layer="measured",
        kinds={"polars", "parquet"},
        partitions_def=concept_and_method,
        deps=[concept_images, image_grid, made_by.encoders],
        pool=asset_defaults.GPU,
    )
    def metrics(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """The score of every image: likeness to the concept and to the text."""
        from personalize_core import steps

        store, concept, method = experiment.store(workspace), concept_of(context), method_of(context)
        version = steps.scoring_stamp(store)
        report = steps.score(store, concept, method, logged(context))
        result = told(context, store, "metrics", report, concept, method)
        return settings.made_with(context.instance, result, made_by.encoders, None, version)

    return Sampled(image_grid, metrics)


@dataclass(frozen=True)
class Compared:
    """What puts all cells of one experiment side by side."""

    reference_scores: dg.AssetsDefinition
    external_metrics: dg.AssetsDefinition
    comparison: dg.AssetsDefinition
    report: dg.AssetsDefinition


def compared(experiment: Experiment, artifact: dg.AssetsDefinition, made: Sampled) -> Compared:
    """Scores of the concept images themselves and of external columns, the comparison and the report.

    Repeats have none of their own.
    """
    external_metrics = external.scored(experiment) if experiment.prefix else external.external_metrics

    @asset_defaults.asset(
        experiment=experiment,
        group="evaluation",
        layer="measured",
        kinds={"polars", "parquet"},
        partitions_def=concepts,
        deps=[concept_images],
        pool=asset_defaults.GPU,
    )
    def reference_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """How alike the concept's own concept images are to each other: the ceiling of likeness."""
        from personalize_core import steps

        store, concept = experiment.store(workspace), concept_of(context)
        report = steps.score_references(store, concept, logged(context))
        return told(context, store, "reference_scores", report, concept)

    @asset_defaults.asset(
        experiment=experiment,
        group="evaluation",
        layer="compared",
        kinds={"polars", "image"},
        deps=[made.metrics, reference_scores, external_metrics, made.image_grid],
        automation_condition=AFTER_SCORES,
        freshness_policy=None if experiment.prefix else COMPARED_LATELY,
    )
    def comparison(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """Every method beside every other: one table of all scores, one grid, one plot of identity against text."""
        from personalize_core import steps

        store = experiment.store(workspace)
        return told(context, store, "comparison", steps.compare(store, logged(context)))

    @asset_defaults.asset(
        experiment=experiment,
        group="evaluation",
        layer="compared",
        kinds={"html"},
        deps=[comparison, artifact, made.image_grid],
        automation_condition=WITH_COMPARISON,
        freshness_policy=None if experiment.prefix else COMPARED_LATELY,
    )
    def report(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """The comparison in words, figures, images and tables: one page that needs nothing else."""
        from personalize_core import steps

        store = experiment.store(workspace)
        return told(context, store, "report", steps.report(store, logged(context)))

    return Compared(reference_scores, external_metrics, comparison, report)


# -- what params.yaml asks for

artifact = learned(USUAL)
_sampled = sampled(USUAL, artifact)
image_grid, metrics = _sampled.image_grid, _sampled.metrics
_compared = compared(USUAL, artifact, _sampled)
reference_scores, external_metrics = _compared.reference_scores, _compared.external_metrics
comparison, report = _compared.comparison, _compared.report

ALL = [
    *settings.USUAL.all,
    concept_images,
    latents,
    class_images,
    artifact,
    image_grid,
    metrics,
    reference_scores,
    external_metrics,
    comparison,
    report,
]


# -- what protocols and further trainings ask for


@dataclass(frozen=True)
class Apart:
    """The assets of an experiment besides the usual one, and the jobs that make them."""

    experiment: Experiment
    learned: list[dg.AssetsDefinition]
    sampled: Sampled
    compared: Compared | None
    settings: list[dg.AssetSpec]

    @property
    def assets(self) -> list[dg.AssetsDefinition | dg.AssetSpec]:
        return [*self.settings, *self.cells, *self.preparing, *self.external, *self.comparing]

    @property
    def cells(self) -> list[dg.AssetsDefinition]:
        """Partitioned by concept and method."""
        return [*self.learned, self.sampled.image_grid, self.sampled.metrics]

    @property
    def preparing(self) -> list[dg.AssetsDefinition]:
        """Partitioned by concept."""
        return [self.compared.reference_scores] if self.compared else []

    @property
    def external(self) -> list[dg.AssetsDefinition]:
        """Partitioned by concept and label."""
        return [self.compared.external_metrics] if self.compared else []

    @property
    def comparing(self) -> list[dg.AssetsDefinition]:
        return [self.compared.comparison, self.compared.report] if self.compared else []


def apart(root: Path) -> list[Apart]:
    """Of every experiment of a workspace besides the usual one."""
    found: list[Apart] = []
    artifacts = {0: artifact}
    for experiment in experiments(root):
        own = []
        if experiment.repeat not in artifacts:
            artifacts[experiment.repeat] = learned(experiment)
            own = [artifacts[experiment.repeat]]
        made = sampled(experiment, artifacts[experiment.repeat])
        compares = None if experiment.repeat else compared(experiment, artifacts[0], made)
        specs = [] if experiment.repeat else settings.of(experiment).all
        found.append(Apart(experiment, own, made, compares, specs))
    return found
