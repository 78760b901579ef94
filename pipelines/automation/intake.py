"""Concept folders copied from where they arrive, and read: what takes time, so that the sensor only lists.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

import dagster as dg

from pipelines.assets import asset_defaults
from pipelines.assets.failures import WAITS
from pipelines.resources import Workspace

SHOWN = 50  # folders in a table


class Arrived(dg.Config):
    """What the sensor `concept_folder` found changed, by name."""

    wanted: dict[str, str] = {}  # where concepts arrive: what settled, and the state in which it did
    gone: list[str] = []  # there, and was brought from there


@asset_defaults.asset(group="data", layer="source", kinds={"image"})
def arrival(context: dg.AssetExecutionContext, config: Arrived, workspace: Workspace) -> dg.MaterializeResult:
    """Folders copied from where concepts arrive, and every folder of data/concepts that has changed checked.

    The sensor `concept_folder` asks for it, and reports on `concept_images` what it found. Materialized by hand, it
    looks again at the folders that could not be used.
    """
    from personalize_core.workspace import arrival
    from personalize_core.workspace.params import Params

    store, passing = workspace.store(), []
    if config.wanted or config.gone:  # else only data/concepts has changed, and a place that is away stops nothing
        address = arrival.address_of(store, Params.read_automation(store.root / "params.yaml").arrival)
        passing = arrival.bring(store, address, config.wanted, config.gone) if address else []
    if passing and context.retry_number < len(WAITS):
        context.log.warning(f"{len(passing)} folders could not be copied, and are tried again: {'; '.join(passing)}")
        raise dg.RetryRequested(max_retries=len(WAITS), seconds_to_wait=WAITS[context.retry_number])
    found = arrival.look(store, again=True)
    problems = {name: folder.problem for name, folder in found.items() if folder.problem} | arrival.refusals(store)
    return dg.MaterializeResult(
        metadata={"folders": len(found), "brought": len(config.wanted), "cannot_be_used": len(problems)}
        | table(problems)
    )


def table(problems: dict[str, str]) -> dict[str, dg.MetadataValue]:
    """The first folders that cannot be used, each with the reason; empty if there are none."""
    rows = [dg.TableRecord({"folder": name, "why": why}) for name, why in list(problems.items())[:SHOWN]]
    columns = dg.TableSchema([dg.TableColumn("folder"), dg.TableColumn("why")])
    return {"reasons": dg.MetadataValue.table(rows, schema=columns)} if rows else {}
