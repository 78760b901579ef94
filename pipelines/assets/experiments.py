"""Which results: those of params.yaml, of a protocol, of another training. Each has assets of its own.

An asset's key is where its result lies in data/: `image_grid`, `under/mini/image_grid`, `repeats/1/artifact`. Dagster
allows letters, digits and `_` alone, so other names of protocols change: `v1.5` gives `under/v1_5_23a9684d/metrics`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from personalize_core.workspace.store import Store
from pipelines.resources import Workspace


@dataclass(frozen=True)
class Experiment:
    """Results that lie apart from all others. Protocols share artifacts, repeats share nothing."""

    protocol: str | None = None  # a file of data/protocols
    repeat: int = 0  # which training, as `personalize repeat` counts them; 0 is the first

    @property
    def prefix(self) -> tuple[str, ...]:
        repeat = ("repeats", str(self.repeat)) if self.repeat else ()
        return (*repeat, "under", allowed(self.protocol)) if self.protocol else repeat

    def group(self, usual: str) -> str:
        """The group of an asset: one for all of an experiment, so that the graph can fold it away."""
        return self.named(usual) if not self.prefix else self.named("")

    def named(self, name: str) -> str:
        """A name for a job or a group of this experiment."""
        return "_".join(part for part in (name, *self.prefix) if part)

    def key(self, name: str) -> dg.AssetKey:
        return dg.AssetKey([*self.prefix, name])

    def store(self, workspace: Workspace) -> Store:
        store = workspace.store()
        return Store(store.root, self.protocol, self.repeat)


def allowed(name: str) -> str:
    """The name with characters that Dagster allows; a part of its hash keeps `a-b` and `a_b` apart."""
    replaced = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return name if replaced == name else f"{replaced}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


USUAL = Experiment()


def experiments(root: Path) -> list[Experiment]:
    """Besides the usual one: those that params.yaml asks for, and those that have results.

    Raises:
        InputError: params.yaml is damaged.
    """
    from personalize_core.workspace.params import Params

    store, automation = Store(root), Params.read_automation(root / "params.yaml")
    protocols, repeats = set(automation.protocols), set(range(1, automation.repeats + 1))
    repeats |= {int(path.name) for path in (store.data / "repeats").glob("[1-9]*") if path.name.isdigit()}
    stores = [store, *(store.again(number) for number in sorted(repeats))]
    results = {path.name for each in stores for path in (each.trained / "under").glob("*") if path.is_dir()}
    names = [None, *sorted((protocols | results) & set(store.protocol_names()))]
    return [Experiment(name, each.repeat) for each in stores for name in names if name or each.repeat]
