"""What happens without a person: new folders become partitions. Nothing here trains."""

import json
from pathlib import Path

import dagster as dg

from pipelines import assets, checks
from pipelines.partitions import CONCEPT, concepts
from pipelines.resources import Workspace

JOBS = [
    dg.define_asset_job(
        "prepare",
        selection=dg.AssetSelection.assets(assets.latents, assets.class_images, assets.reference_scores)
        | dg.AssetSelection.checks(checks.photographs_usable),
        description="All that the methods need of one concept.",
    ),
    dg.define_asset_job(
        "learn",
        selection=dg.AssetSelection.assets(assets.artifact, assets.image_grid, assets.metrics),
        description="Train one method on one concept, draw with it and score what it drew, in one process.",
    ),
    dg.define_asset_job(
        "compare",
        selection=dg.AssetSelection.assets(assets.comparison, assets.report),
        description="Put all scores and pictures that there are side by side, and tell of them in one page.",
    ),
]


def scan(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Look at every folder of data/concepts.

    Returns:
        name -> hash of the content, for those that are concepts; name -> what is wrong, for the others.
    """
    from personalize_core.concept import check_name
    from personalize_core.errors import InputError
    from personalize_core.files import stamp_of
    from personalize_core.intake import content, read_concept

    good, bad = {}, {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            check_name(path.name)
            read_concept(path)
            good[path.name] = stamp_of(content(path))
        except InputError as error:
            bad[path.name] = str(error)
    return good, bad


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps the partition `concept` like the folders of data/concepts, and reports what they hold. "
    "A folder counts when it was the same on two looks, so that one that is being copied is left to settle.",
)
def concept_folder(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult:
    """The cursor holds what the last look saw, and what has been reported."""
    good, bad = scan(workspace.store().concepts)
    for reason in bad.values():
        context.log.warning(reason)
    cursor = json.loads(context.cursor or '{"seen": {}, "reported": {}}')
    known = set(context.instance.get_dynamic_partitions(CONCEPT))
    settled = {name: content for name, content in good.items() if cursor["seen"].get(name) == content}
    changed = {name: content for name, content in settled.items() if cursor["reported"].get(name) != content}
    added = sorted(settled.keys() - known)
    gone = sorted(known - good.keys() - bad.keys())

    reported = {name: content for name, content in cursor["reported"].items() if name not in gone} | changed
    cursor_now = json.dumps({"seen": good, "reported": reported})
    if not (added or gone or changed):
        why = "; ".join(bad.values()) or "the folders of data/concepts are as they were"
        return dg.SensorResult(skip_reason=why, cursor=cursor_now)
    requests = [concepts.build_add_request(added)] if added else []
    requests += [concepts.build_delete_request(gone)] if gone else []
    return dg.SensorResult(
        cursor=cursor_now,
        dynamic_partitions_requests=requests,
        asset_events=[
            dg.AssetMaterialization(
                assets.concept_images.key,
                partition=name,
                metadata={"path": str(workspace.store().concept_folder(name))},
                tags={"dagster/data_version": content},
            )
            for name, content in changed.items()
        ],
    )
