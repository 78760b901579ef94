"""The processes that serve the Dagster UI."""
