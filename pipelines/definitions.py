"""Gathers what the other files define: the code location that workspace.yaml names."""

from __future__ import annotations

import dagster as dg

from pipelines import analyses, assets, automation, checks, recovery
from pipelines.resources import Workspace

defs = dg.Definitions(
    assets=[*assets.ALL, *analyses.ALL],
    asset_checks=checks.ALL,
    jobs=automation.JOBS,
    sensors=[automation.concept_folder, recovery.lost_runs_sensor],
    resources={"workspace": Workspace.configure_at_launch()},  # so that a run may choose its protocol
    # Every run has a process of its own already; its steps then share one import of torch and one base model.
    executor=dg.in_process_executor,
)
