"""What is used of Dagster besides its documented interface, one test for each; and nothing of its private modules.

pyproject.toml keeps Dagster below 1.14 because of these. The others are: the pool's limit (test_pipelines.py, what the
UI prepares), a run reported as failed (test_recovery.py), the web server's middleware (test_guard.py), and the command
that makes the server (test_ui.py).
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import dagster as dg
import pytest

from personalize_core import steps
from pipelines.assets import chain, settings
from pipelines.presentation import metadata
from tests.in_dagster import materialize, passing

ROOT = Path(__file__).parents[2]
EXCEPTIONS = {  # what the UI marks as stale is computed nowhere else
    ("test_minimal_work.py", "dagster._core.definitions.data_version"),
    ("test_minimal_work.py", "dagster._core.loader"),
    ("test_found_results.py", "dagster._core.definitions.data_version"),
    ("test_found_results.py", "dagster._core.loader"),
}
PAIR = dg.MultiPartitionKey({"concept": "dog7", "method": "textual_inversion"})


@pytest.mark.parametrize("folder", ["pipelines", "tests", "benchmarks"])
def test_no_private_module_of_dagster_is_imported(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found += [(path.name, name) for name in names if name.startswith("dagster") and "._" in name]
    assert set(found) <= EXCEPTIONS


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Steps that do nothing, under recipe version `made with`."""
    report = steps.Report("s", False, 1.0, tmp_path)
    for name in ("encode_images", "train"):
        monkeypatch.setattr(steps, name, lambda *arguments: report)
    for name in ("check_inputs", "plan", "long_work_notice"):
        monkeypatch.setattr(steps, name, lambda *arguments: None)
    for name in ("latents", "artifact"):
        monkeypatch.setattr(steps.result_checks, name, passing(name))
    monkeypatch.setattr(steps, "recipe_stamp", lambda *arguments: "made with")
    monkeypatch.setattr(metadata, "loss_curve", lambda report: {})


def tags_of(done: dg.ExecuteInProcessResult) -> dict[str, str]:
    (event,) = done.get_asset_materialization_events()
    return dict(event.materialization.tags or {})


def of_partitions(*versions: str) -> str:
    """Dagster's version of an input of these partitions."""
    return hashlib.sha256("".join(versions).encode()).hexdigest()


def report(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str, version: str) -> None:
    for event in settings.events(key, partition, version):
        instance.report_runless_asset_event(event)


def test_dagster_reads_the_version_of_an_event_that_no_run_made_from_its_tag(instance, trained, tmp_path):
    """Events of DagsterInstance.report_runless_asset_event have no field for it."""
    report(instance, chain.concept_images.key, "dog7", "version of the images")
    tags = tags_of(materialize(instance, tmp_path, [chain.latents], "dog7"))
    assert tags["dagster/input_data_version/concept_images"] == of_partitions("version of the images")


def test_what_a_result_was_made_with_is_written_as_dagster_writes_it(instance, trained, tmp_path):
    """Of an input that a run made, Dagster writes both tags itself; of the recipe, made_with replaces its word."""
    report(instance, settings.USUAL.recipe.key, "textual_inversion", "another")
    materialize(instance, tmp_path, [chain.latents], "dog7")
    tags = tags_of(materialize(instance, tmp_path, [chain.artifact], PAIR))
    asked = dg.AssetRecordsFilter(asset_key=chain.latents.key, asset_partitions=["dog7"])
    (latents,) = instance.fetch_materializations(asked, limit=1).records
    assert tags["dagster/input_data_version/latents"] == of_partitions("s")
    assert tags["dagster/input_event_pointer/latents"] == str(latents.storage_id)
    asked = dg.AssetRecordsFilter(asset_key=settings.USUAL.recipe.key, asset_partitions=["textual_inversion"])
    (recipe,) = instance.fetch_observations(asked, limit=1).records
    assert tags["dagster/input_data_version/recipe"] == "made with"
    assert tags["dagster/input_event_pointer/recipe"] == str(recipe.storage_id)
