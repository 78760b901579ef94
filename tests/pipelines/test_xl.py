"""A tiny Stable Diffusion XL through the assets of the pipeline, none of them a stand-in, and its checks."""

from __future__ import annotations

import json

import dagster as dg
import polars as pl
import pytest
from PIL import Image

from personalize_core import steps
from pipelines.assets import chain
from tests import tiny_workspace
from tests.in_dagster import materialize

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")
METHODS = ("base_model", "textual_inversion", "personalized_residuals")


def test_methods_are_materialized_from_concept_images_to_the_report(instance, tmp_path):
    store = tiny_workspace.make_xl(tmp_path)
    of_concept = [chain.latents, chain.class_images, chain.reference_scores]
    assert materialize(instance, tmp_path, of_concept, "rex").success
    for method in METHODS:
        pair = dg.MultiPartitionKey({"concept": "rex", "method": method})
        result = materialize(instance, tmp_path, [chain.artifact, chain.image_grid, chain.metrics], pair)
        assert result.success
        broken = [
            check.check_name
            for check in result.get_asset_check_evaluations()
            if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
        ]
        assert not broken
        with Image.open(store.grid(method, "rex") / steps.image_name(method, 0, 0)) as image:
            assert image.size == (24, 24)
        assert method in pl.read_parquet(store.scores(method, "rex") / "scores.parquet")["variant"]
    assert materialize(instance, tmp_path, [chain.comparison, chain.report]).success
    about = json.loads((store.artifact("textual_inversion", "rex") / "config.json").read_text())
    assert about["parameters"] == 32 + 16  # an embedding for each text encoder
