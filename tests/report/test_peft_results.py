"""A comparison as PEFT's result files: the keys that its programs read, and the values of our own tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.workspace.store import Store
from tests.report import workspace

# What log_results of PEFT's method_comparison/image-gen/utils.py writes, at any depth.
KEYS = {
    "run_info": {
        "created_at",
        "total_time",
        "experiment_name",
        "peft_branch",
        "train_config",
        "peft_config",
        "error_msg",
    },
    "train_info": {
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "train_time",
        "file_size",
        "num_trainable_params",
        "num_total_params",
        "status",
        "metrics",
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    store = workspace.make(tmp_path_factory.mktemp("peft") / "workspace")
    steps.compare(store)
    return store


@pytest.fixture(scope="module")
def exported(store: Store, tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("to") / "results"
    report = steps.export_peft(store, folder)
    assert set(report.images.values()) == set(folder.iterdir())  # PEFT's programs read all that is there
    return {path.stem: json.loads(path.read_text()) for path in report.images.values()}


def test_there_is_a_file_for_each_variant_and_concept(exported):
    variants = [*workspace.LEVELS, "real_images"]
    assert set(exported) == {f"{variant}--{concept}" for variant in variants for concept in workspace.CONCEPTS}


def test_every_file_has_the_keys_of_pefts(exported):
    for result in exported.values():
        assert {part: set(result[part]) for part in result} == KEYS
        last = result["train_info"]["metrics"][-1]
        assert {"step", "test dino_similarity", "drift", "train loss", "train samples"} <= set(last)
        assert result["run_info"]["peft_config"]["peft_type"] and result["train_info"]["status"] == "success"


def test_the_similarity_is_the_mean_of_the_scores(store, exported):
    """Recomputed from the table of scores: over a prompt's images, then over prompts."""
    table = pl.read_parquet(store.comparison() / "scores.parquet").filter(
        pl.col("metric") == "dino", pl.col("headline"), pl.col("prompt").is_not_null()
    )
    for (variant, concept), rows in table.partition_by("variant", "concept", as_dict=True).items():
        by_prompt: dict[str, list[float]] = {}
        for prompt, score in rows.select("prompt", "score").iter_rows():
            by_prompt.setdefault(prompt, []).append(score)
        mean = np.mean([np.mean(scores) for scores in by_prompt.values()])
        last = exported[f"{variant}--{concept}"]["train_info"]["metrics"][-1]
        assert last["test dino_similarity"] == pytest.approx(mean, abs=1e-9)
        assert last["scores"]["dino"]["low"] < mean < last["scores"]["dino"]["high"]


def test_what_was_recorded_of_a_training_stands_there_and_the_rest_is_null(exported):
    trained = exported["dreambooth--rex"]
    assert trained["run_info"]["experiment_name"] == "dreambooth/rex"
    assert trained["run_info"]["train_config"]["steps"] == 40
    assert trained["train_info"]["num_trainable_params"] == 12345 and trained["train_info"]["file_size"] == 4321
    last = trained["train_info"]["metrics"][-1]
    assert last["step"] == 40
    assert last["train loss"] == pytest.approx(0.3 + 0.1 * np.mean([1 / (i + 1) for i in range(40)]))
    assert trained["train_info"]["train_time"] is None and last["drift"] is None
    real = exported["real_images--rex"]
    assert real["train_info"]["file_size"] is None and real["train_info"]["metrics"][-1]["step"] == 0
    assert real["train_info"]["metrics"][-1]["test dino_similarity"] > 0


def test_nothing_is_overwritten_and_nothing_comes_from_nothing(store, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        steps.export_peft(store, tmp_path)
    (tmp_path / "params.yaml").write_text((store.root / "params.yaml").read_text())
    with pytest.raises(InputError, match="nothing has been compared"):
        steps.export_peft(Store(tmp_path), Path(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
