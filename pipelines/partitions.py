"""What the assets are partitioned by. Two dimensions are what Dagster offers; variants of sampling live in one grid."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from personalize_core.workspace.params import Params

CONCEPT, METHOD = "concept", "method"  # a run's key is written CONCEPT|METHOD, in alphabetical order of these

concepts = dg.DynamicPartitionsDefinition(name=CONCEPT)
# An ablation that is written into params.yaml later is a partition once definitions are loaded again.
METHODS = Params.read_known_methods(Path("params.yaml"))
methods = dg.StaticPartitionsDefinition(METHODS)
concept_and_method = dg.MultiPartitionsDefinition({CONCEPT: concepts, METHOD: methods})


def concept_of(context: dg.AssetExecutionContext) -> str:
    """The concept that this run is about."""
    key = context.partition_key
    return key.keys_by_dimension[CONCEPT] if isinstance(key, dg.MultiPartitionKey) else key


def method_of(context: dg.AssetExecutionContext) -> str:
    """The method that this run is about; the asset must be partitioned by concept and method."""
    key = context.partition_key
    if not isinstance(key, dg.MultiPartitionKey):
        raise TypeError(f"the partition {key!r} names no method")
    return key.keys_by_dimension[METHOD]
