"""What Dagster's UI shows of a result: metadata, lineage, progress."""
