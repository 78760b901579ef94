"""What Dagster's history holds of an asset."""

from __future__ import annotations

import dagster as dg


def last(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None = None) -> dg.EventLogRecord | None:
    """The last materialization, of a partition or of any."""
    asked = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(asked, limit=1).records
    return records[0] if records else None


def data_version(record: dg.EventLogRecord | None) -> str | None:
    """That of a materialization or an observation."""
    event = (record.asset_materialization or record.asset_observation) if record else None
    return (event.tags or {}).get("dagster/data_version") if event else None
