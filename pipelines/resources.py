"""What the assets are handed."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from personalize_core.store import Store


class Workspace(dg.ConfigurableResource):
    """The folder with params.yaml and data/."""

    root: str = "."  # relative to the working directory, which is also where dagster.yaml is read from

    def store(self) -> Store:
        return Store(Path(self.root).resolve())
