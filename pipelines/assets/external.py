"""Images made elsewhere: a partition for each concept and label, scored when its description is written or changed.

`personalize score FOLDER --concept NAME --as LABEL` writes the descriptions, files of data/external.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

import json

import dagster as dg

from personalize_core.workspace.store import Store
from pipelines.assets import asset_defaults, outcomes, settings
from pipelines.assets.experiments import USUAL, Experiment
from pipelines.partitions import CONCEPT, concept_of, concepts
from pipelines.presentation.progress import logged
from pipelines.resources import Workspace

LABEL = "label"
labels = dg.DynamicPartitionsDefinition(name=LABEL)
concept_and_label = dg.MultiPartitionsDefinition({CONCEPT: concepts, LABEL: labels})


def scored(experiment: Experiment) -> dg.AssetsDefinition:
    """The scores of external columns, by params.yaml or by a protocol."""
    made_by = settings.of(experiment)

    @asset_defaults.asset(
        experiment=experiment,
        group="evaluation",
        layer="measured",
        kinds={"polars", "parquet"},
        partitions_def=concept_and_label,
        deps=[dg.AssetKey("concept_images"), made_by.encoders],
        pool=asset_defaults.GPU,
    )
    def external_metrics(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        """The score of every image of an external column: images that another program made, where they lie."""
        from personalize_core import steps

        store, concept, label = experiment.store(workspace), concept_of(context), label_of(context)
        version = steps.scoring_stamp(store)
        report = steps.score_external(store, concept, label, logged(context))
        result = outcomes.told(context, store, "external_metrics", report, concept, label)
        return settings.made_with(context.instance, result, made_by.encoders, None, version)

    return external_metrics


external_metrics = scored(USUAL)
score_external = dg.define_asset_job(
    "score_external",
    selection=dg.AssetSelection.assets(external_metrics),
    description="Score the images of one external column.",
)


def label_of(context: dg.AssetExecutionContext) -> str:
    key = context.partition_key
    if not isinstance(key, dg.MultiPartitionKey):
        raise TypeError(f"the partition {key!r} names no label")
    return key.keys_by_dimension[LABEL]


@dg.sensor(
    job=score_external,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    tags={"stage": "arrival"},
    description="Keeps the partition `label` like data/external, and asks for a run for every column that is new or "
    "described otherwise than before, unless it has been scored since, as by the command that described it. Changed "
    "images are found when a column is scored again.",
)
def external_columns(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult:
    """The cursor holds the hash of every description: that a run was asked for or that needed none, and of new ones.

    A new one is looked at twice, because the command that wrote it may be about to score the column.
    """
    from personalize_core import steps
    from personalize_core.files.stamps import sha256
    from personalize_core.workspace.external_columns import registered

    store, last = workspace.store(), {"done": {}, "new": {}} | json.loads(context.cursor or "{}")
    known = set(context.instance.get_dynamic_partitions(CONCEPT))
    columns = [(label, concept) for label, concept in registered(store) if concept in known]
    now = {f"{label}/{concept}": sha256(store.external(label, concept)) for label, concept in columns}
    wanted = {label for label, _ in columns}
    there = set(context.instance.get_dynamic_partitions(LABEL))
    changes = [
        *([labels.build_add_request(sorted(wanted - there))] if wanted - there else []),
        *([labels.build_delete_request(sorted(there - wanted))] if there - wanted else []),
    ]
    done, new, requests = {}, {}, []
    for label, concept in columns:
        name = f"{label}/{concept}"
        if last["done"].get(name) == now[name] or steps.is_scored(store, label, concept):
            done[name] = now[name]
        elif last["new"].get(name) != now[name] or _is_under_way(store, label, concept):
            new[name] = now[name]
        else:
            done[name] = now[name]
            both = dg.MultiPartitionKey({CONCEPT: concept, LABEL: label})
            requests.append(dg.RunRequest(f"{name} {now[name]}", partition_key=both))
    cursor = json.dumps({"done": done, "new": new})
    if not changes and not requests:
        waiting = f"{', '.join(new)}: left to settle" if new else "the columns of data/external are as they were"
        return dg.SensorResult(skip_reason=waiting, cursor=cursor)
    return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=changes, cursor=cursor)


def _is_under_way(store: Store, label: str, concept: str) -> bool:
    return any(store.is_under_way(what, label, concept) for what in ("grid", "scores"))
