"""Gathers what the other files define: the code location that workspace.yaml names."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from pipelines.assets import analyses, canary, chain, checks, external, settings
from pipelines.automation import (
    arrival,
    found_results,
    intake,
    jobs,
    notifications,
    recovery,
    retention,
    schedules,
    together,
)
from pipelines.resources import Workspace

apart = chain.apart(Path.cwd())

defs = dg.Definitions(
    assets=[
        intake.arrival,
        *chain.ALL,
        *(asset for each in apart for asset in each.assets),
        *analyses.ALL,
        canary.canary,
    ],
    asset_checks=[*checks.ALL, arrival.folders_usable],
    jobs=[
        *jobs.ALL,
        *(job for each in apart for job in jobs.apart(each)),
        external.score_external,
        together.learn_concept,
    ],
    schedules=[schedules.nightly, schedules.nightly_preparation, schedules.canary_after_upgrade],
    sensors=[
        arrival.concept_folder,
        settings.settings,
        external.external_columns,
        found_results.results,
        schedules.training_follows,
        schedules.comparison_follows,
        recovery.lost_runs_sensor,
        retention.old_runs,
        notifications.failed_runs,
        notifications.notifications,
    ],
    resources={"workspace": Workspace()},
    # Every run has a process of its own already; its steps then share one import of torch and one base model.
    executor=dg.in_process_executor,
)
