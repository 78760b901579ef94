"""The analyses as assets: what they ask of the core, what they show of its answer, and that nothing makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from PIL import Image

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.files.atomic import whole_folder, write_json
from personalize_core.workspace.store import Store
from pipelines.assets import analyses, chain
from pipelines.definitions import defs
from tests import tiny_workspace
from tests.in_dagster import materialize
from tests.watching import choose

pytestmark = pytest.mark.usefixtures("short_checks")

COMMON = {"ops": {"class_nouns": {"config": {"nouns": "common"}}}}
PAIR = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})


def folder_of_analyses(folder: Path, images: int) -> Path:
    """As the step leaves it behind."""
    files = [{"file": f"image_{n:02d}.png", "caption": f"image {n}"} for n in range(images)]
    found = {
        "absence": {
            "title": "Missing concepts", "how": "-", "metrics": {"core, share absent": 0.125, "images": 10},
            "absent": {"steps": "no log"}, "images": files, "tables": [],
        },
        "bare": {"title": "The bare placeholder", "how": "-", "not_defined": "nothing is learned"},
    }  # fmt: skip
    with whole_folder(folder, "the stamp") as new:
        for one in files:
            Image.new("RGB", (60, 40), (0, 90, 160)).save(new / one["file"])
        write_json(new / steps.ANALYSES, {"order": ["absence", "bare"], "analyses": found})
    return folder


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the steps were asked, in order."""
    choose(tmp_path)
    asked, folder = [], folder_of_analyses(tmp_path / "found", images=12)
    images = {f"image {n}": folder / f"image_{n:02d}.png" for n in range(12)}

    def stand_in(name):
        def step(store, *what):
            asked.append((name, *(one for one in what if not callable(one))))
            return steps.Report("the stamp", False, 1.0, folder, {"absence: core, share absent": 0.125}, images)

        return step

    for name in ("analyse", "analyse_together", "suggest_class"):
        monkeypatch.setattr(steps, name, stand_in(name))
    return asked


def test_a_partition_is_analysed_for_its_own_concept_and_method(instance, asked, tmp_path):
    assert materialize(instance, tmp_path, [analyses.analyses], PAIR).success
    assert asked == [("analyse", "rex", "textual_inversion")]


def test_all_that_were_analysed_and_no_others_stand_together(instance, asked, tmp_path):
    store = Store(tmp_path)
    with pytest.raises(InputError, match="no method has been analysed on 'rex'"):
        steps.analysed(store, "rex")
    for method in ("core", "attn_dreambooth@without_stage_2", "together"):
        folder_of_analyses(store.analyses(method, "rex"), images=0)
    folder_of_analyses(store.analyses("dreambooth", "max"), images=0)
    assert materialize(instance, tmp_path, [analyses.analyses_together], "rex").success
    assert asked == [("analyse_together", "rex", ["core", "attn_dreambooth@without_stage_2"])]


@pytest.mark.parametrize("nouns", [None, "wordnet"])
def test_the_nouns_to_choose_from_are_the_runs_configuration(instance, asked, tmp_path, nouns):
    config = {"ops": {"class_nouns": {"config": {"nouns": nouns}}}} if nouns else None
    assert materialize(instance, tmp_path, [analyses.class_nouns], "rex", run_config=config).success
    assert asked == [("suggest_class", "rex", nouns)]


def test_the_first_images_and_every_number_stand_in_the_page(instance, asked, tmp_path):
    result = materialize(instance, tmp_path, [analyses.analyses], PAIR)
    (event,) = result.get_asset_materialization_events()
    shown: Any = event.materialization.metadata
    images = [f"image_{n:02d}" for n in range(analyses.MOST_IMAGES)]
    assert [name for name in shown if name.startswith("image")] == [
        name for one in images for name in (f"{one}_preview", one)
    ]
    assert all(shown[f"{name}_preview"].value.startswith("![") and len(shown[f"{name}_preview"].value) < 1000
               for name in images)  # fmt: skip
    rows = [tuple(record.data.values()) for record in shown["metrics"].value.records]
    assert rows == [
        ("Missing concepts", "core, share absent", "0.1250"),
        ("Missing concepts", "images", "10"),
        ("Missing concepts", "steps", "no log"),
        ("The bare placeholder", "not defined", "nothing is learned"),
    ]
    assert (event.materialization.tags or {})["dagster/data_version"] == "the stamp"
    assert len(json.dumps(str(shown))) < 1_000_000


def test_no_job_and_no_condition_makes_them_and_they_train_nothing():
    names = {asset.key for asset in analyses.ALL}
    repository = defs.get_repository_def()
    for job in repository.get_all_jobs():
        if not job.name.startswith("__"):  # the one that Dagster keeps for whatever a person selects
            assert not names & set(job.asset_layer.selected_asset_keys), job.name
    for asset in analyses.ALL:
        assert all(spec.automation_condition is None for spec in asset.specs)
        assert not set(asset.keys) & {chain.artifact.key} and asset.group_names_by_key[asset.key] == "analysis"


def test_the_class_nouns_of_real_concept_images_are_shown(instance, tmp_path):
    store = tiny_workspace.make(tmp_path / "workspace")
    result = materialize(instance, store.root, [analyses.class_nouns], "rex", run_config=COMMON)
    (event,) = result.get_asset_materialization_events()
    shown: Any = event.materialization.metadata
    rows = [record.data for record in shown["metrics"].value.records]
    assert shown["path"].value == str(store.analyses("class_nouns", "rex"))
    assert "dog" in {row["what"] for row in rows} and len(rows) >= 15
    assert all(-1 <= float(row["value"]) <= 1 for row in rows)
    assert "class_nouns_preview" in shown
