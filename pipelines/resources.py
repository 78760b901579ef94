"""What the assets are handed."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import Field

from personalize_core.workspace.store import Store
from pipelines import run_locks


class Workspace(dg.ConfigurableResource):
    """The folder with params.yaml and data/."""

    root: str = Field(default=".", description="Relative to the working directory, where dagster.yaml lies too.")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Before the steps of a run: its process says that it lives (automation/recovery.py). Ticks have no run."""
        if context.run:
            run_locks.hold(self.run_locks(), context.run.run_id)

    def run_locks(self) -> Path:
        return Store(Path(self.root).resolve()).work("runs")

    def store(self) -> Store:
        return Store(Path(self.root).resolve())
