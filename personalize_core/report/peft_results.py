"""The last comparison in the layout of PEFT's benchmark of image generation: a JSON file per variant and concept.

The layout is that of `method_comparison/image-gen/results` in https://github.com/huggingface/peft (log_results of
utils.py). Three things differ, see docs/reading_peft_results.md. The score is the mean cosine with the concept images
by the comparison's identity encoder, which the file names; each metric stands there with its interval; and what was not
recorded is null, never 0.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from personalize_core.errors import InputError
from personalize_core.files.atomic import read_record, record_of_result
from personalize_core.metrics import parquet
from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.training import training_log
from personalize_core.workspace.store import Store

IDENTITY = "dino"  # the metric in place of PEFT's similarity
LOSS_STEPS = 100  # PEFT's eval_steps: the loss is the mean over as many last steps
NOT_ON_CARD = "resident set"  # how the costs begin to name memory that is not the graphics card's
PACKAGES = ("transformers", "peft", "datasets", "diffusers", "torch")


def results(store: Store) -> dict[str, dict[str, Any]]:
    """File name -> what it holds, for each variant and concept of the last comparison.

    Raises:
        InputError: nothing has been compared.
    """
    path = store.comparison() / "summary.parquet"
    if not path.is_file():
        raise InputError(f"nothing has been compared in {store.comparison()}; `personalize compare` makes it")
    summary = parquet.read_parquet(path).filter(pl.col("headline"), pl.col("concept") != ALL_CONCEPTS)
    costs = parquet.read_parquet(store.costs()) if store.costs().is_file() else None
    found = {}
    for (variant, concept), rows in summary.partition_by(
        "variant", "concept", as_dict=True, maintain_order=True
    ).items():
        known = {} if costs is None else _first(costs.filter(variant=variant, concept=concept))
        found[f"{variant}--{concept}.json"] = _result(store, str(variant), str(concept), rows, known)
    return found


def _result(store: Store, variant: str, concept: str, rows: pl.DataFrame, costs: dict[str, Any]) -> dict[str, Any]:
    method = rows["method"][0]
    artifact = store.artifact(method, concept)
    config, made = read_record(artifact / "config.json"), record_of_result(store.making(artifact), artifact)
    base, packages = config.get("base_model") or {}, made.get("packages") or config.get("versions") or {}
    log = training_log.read(artifact) if (artifact / training_log.LOG).is_file() else []
    losses = [row["diffusion"] for row in log[-LOSS_STEPS:] if isinstance(row.get("diffusion"), float)]
    identity = _first(rows.filter(metric=IDENTITY))
    on_card = not (costs.get("memory_of") or NOT_ON_CARD).startswith(NOT_ON_CARD)
    options = config.get("config") or {}
    return {
        "run_info": {
            "created_at": made.get("finished"),
            "total_time": made.get("seconds"),
            "experiment_name": f"{variant}/{concept}",
            "peft_branch": None,
            "train_config": {"model_id": rows["base_model"][0], "seed": config.get("seed"), **options},
            "peft_config": {"peft_type": method.upper(), **options},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": costs.get("training_memory_bytes") if on_card else None,
            "accelerator_memory_reserved_99th": None,
            "train_time": costs.get("training_seconds"),
            "file_size": _whole(costs.get("artifact_bytes")),
            "num_trainable_params": _whole(costs.get("parameters")),
            "num_total_params": None,
            "status": "success",
            "metrics": [
                {
                    "step": len(log),
                    "test dino_similarity": identity.get("mean"),
                    "drift": None,
                    "train loss": sum(losses) / len(losses) if losses else None,
                    "train samples": None,
                    "scores": {row["metric"]: _score(row) for row in rows.iter_rows(named=True)},
                }
            ],
        },
        "meta_info": {
            "model_info": {"sha": base.get("revision"), "created_at": None},
            "dataset_info": {"sha": None, "created_at": None},
            "package_info": {f"{name}-version": packages.get(name) for name in PACKAGES},
            "system_info": {"system": made.get("system"), "accelerator": made.get("device")},
            "pytorch_info": None,
        },
    }


def _score(row: dict[str, Any]) -> dict[str, Any]:
    """A metric's mean and interval, as the summary has them."""
    return {name: row[name] for name in ("encoder", "mean", "low", "high", "over", "images", "prompts")}


def _first(rows: pl.DataFrame) -> dict[str, Any]:
    return rows.row(0, named=True) if len(rows) else {}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
