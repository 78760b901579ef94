"""The plan names just what a run would make, and says why in words that a person knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from personalize_core import steps
from personalize_core.cli.main import app
from personalize_core.files.atomic import MANIFEST
from personalize_core.workspace.store import REFERENCES, Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHODS = ("base_model", "textual_inversion")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace.finished(tmp_path_factory.mktemp("planned"), ["cup", "rex"], METHODS).root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished, tmp_path)


def change(store: Store, edit, methods: tuple[str, ...] = METHODS) -> Store:
    values = tiny_workspace.params_of(Path(store.params.base_model).parents[1], methods)
    edit(values)
    return tiny_workspace.write_params(store.root, values)


def planned(store: Store) -> list[tuple[str, str, str, str]]:
    return [(cell.concept, cell.method, cell.first, cell.why) for cell in steps.plan(store)]


def test_of_a_finished_workspace_nothing_is_planned(store):
    assert planned(store) == []


def test_what_is_not_there_is_planned_from_its_first_step_on(store):
    shutil.rmtree(store.data / "artifacts")
    assert [row[2:] for row in planned(store)] == [("train", "has not been trained")] * 4


def test_a_concept_is_prepared_when_its_concept_images_are_encoded_and_scored(store):
    shutil.rmtree(store.latents("cup"))
    shutil.rmtree(store.scores(REFERENCES, "rex"))
    for concept, step in (("cup", steps.encode_images), ("rex", steps.score_references)):
        assert not steps.is_prepared(store, concept)
        step(store, concept)
        assert steps.is_prepared(store, concept)


def test_a_wrong_recipe_leaves_its_own_cells_out_and_no_others(store):
    base = store.params.base_model
    store = change(store, lambda values: values["methods"]["textual_inversion"][base].update(tempo=3))
    assert steps.is_prepared(store, "rex") and steps.is_prepared(store, "cup")
    cells = steps.plan(store)
    assert {cell.method for cell in cells} == {"textual_inversion"}
    assert all("tempo" in cell.why and not cell.possible for cell in cells)


def test_a_wrong_recipe_keeps_no_other_method_from_being_prepared(store):
    """The run that prepares a concept goes on without it: check, latents and class images."""
    base = store.params.base_model
    store = change(store, lambda values: values["methods"]["textual_inversion"][base].update(tempo=3))
    shutil.rmtree(store.latents("cup"))
    assert not steps.is_prepared(store, "cup")
    assert all(gate.passed for gate in steps.result_checks.concept_images(store, "cup"))
    steps.encode_images(store, "cup")
    steps.make_class_images(store, "red mug")
    assert steps.is_prepared(store, "cup")


def test_a_concept_image_that_cannot_be_read_is_told_of_before_anything_would_train_on_it(store):
    concept_image = store.concept_folder("rex") / "1.png"
    concept_image.write_bytes(concept_image.read_bytes()[:-200])
    cells = steps.plan(store)
    assert [(cell.concept, cell.possible) for cell in cells] == [("rex", False)] * 2
    assert all("1.png cannot be read as an image" in cell.why for cell in cells)


def test_a_changed_and_an_added_concept_image_are_named(store):
    Image.new("RGB", (20, 20), "red").save(store.concept_folder("rex") / "0.png")
    Image.new("RGB", (20, 20), "blue").save(store.concept_folder("rex") / "9.png")
    why = "concept images changed: 0.png and added 9.png"
    assert planned(store) == [("rex", "base_model", "train", why), ("rex", "textual_inversion", "train", why)]
    assert not steps.is_prepared(store, "rex") and steps.is_prepared(store, "cup")


def test_a_changed_recipe_is_named_with_its_values(store):
    base = store.params.base_model
    store = change(store, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.25, steps=4))
    for row in planned(store):
        assert row[1:3] == ("textual_inversion", "train")
        assert "steps 3 -> 4" in row[3] and "-> 0.25" in row[3] and "batch_size" not in row[3]


def test_other_sampling_is_sampled_and_other_encoders_are_scored_anew(store):
    sampled = change(store, lambda values: values["sampling"].update(guidance=2.0))
    assert {row[2:] for row in planned(sampled)} == {("sample", "sampling changed: guidance 3.0 -> 2.0")}
    scored = change(store, lambda values: values["encoders"].update(texts=["class_phrase"]))
    assert {row[2] for row in planned(scored)} == {"score"}
    assert all(row[3].startswith("encoders changed") for row in planned(scored))


def test_changed_code_is_named_by_its_file(store, monkeypatch):
    from personalize_core.files import stamps

    plain = stamps.sha256
    edited = ("textual_inversion", "method.py")
    monkeypatch.setattr(stamps, "sha256", lambda path: plain(path) + "edited" * (path.parts[-2:] == edited))
    why = "code changed: methods/textual_inversion/method.py"
    assert planned(store) == [(name, "textual_inversion", "train", why) for name in ("cup", "rex")]


def test_a_plan_reads_every_concept_image_and_every_weights_file_once_and_the_next_plan_again(store, monkeypatch):
    from personalize_core.concepts import concept_files
    from personalize_core.metrics import encoder_names

    read: list[Path] = []
    plain = concept_files.sha256
    for module in (concept_files, encoder_names):
        monkeypatch.setattr(module, "sha256", lambda path: read.append(path) or plain(path))
    for _ in range(2):
        assert steps.plan(store) == []
        assert len(read) == len(set(read)) == 2 * (3 + 1) + 2  # of two concepts, with their descriptions; two encoders
        read.clear()
    Image.new("RGB", (20, 20), "red").save(store.concept_folder("rex") / "0.png")
    assert {row[0] for row in planned(store)} == {"rex"}


def test_a_method_added_is_one_row(store):
    store = change(store, lambda values: None, (*METHODS, "dreambooth"))
    expected = [(name, "dreambooth", "train", "has not been trained") for name in ("cup", "rex")]
    assert planned(store) == expected


def test_a_lost_file_and_an_older_manifest_are_said(store):
    (store.grid("base_model", "rex") / "grid.png").unlink()
    manifest = store.artifact("textual_inversion", "cup") / MANIFEST
    content = json.loads(manifest.read_text())
    del content["made_from"]
    manifest.write_text(json.dumps(content | {"stamp": "of another time"}))
    rows = planned(store)
    assert [row[:3] for row in rows] == [("cup", "textual_inversion", "train"), ("rex", "base_model", "sample")]
    assert "kept no list" in rows[0][3] and "changed since it was made, or gone" in rows[1][3]


@pytest.mark.parametrize("edited", [{"stamp": "another"}, {"made_from": ["no", "names"]}, {"files": {"a": 1}}])
def test_a_manifest_that_was_edited_is_planned_where_a_step_would_make_it_anew(store, edited):
    manifest = store.scores("textual_inversion", "cup") / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | edited))
    found = [(row[:3], row[3].partition(":")[0]) for row in planned(store)]
    made = not steps.score(store, "cup", "textual_inversion").skipped
    said = "its manifest has been edited" if "stamp" in edited else "its manifest is missing or damaged"
    assert found == ([(("cup", "textual_inversion", "score"), said)] if made else [])


def test_what_cannot_be_trained_is_planned_with_its_reason_and_stops_no_other(store):
    store = change(
        store, lambda values: values["methods"]["textual_inversion"].update({values["base_model"]: {"x": 1}})
    )
    rows = planned(store)
    assert [row[:3] for row in rows] == [(name, "textual_inversion", "cannot") for name in ("cup", "rex")]
    assert all("no key 'x'" in row[3] for row in rows) and not any(cell.possible for cell in steps.plan(store))


def test_the_command_prints_a_line_a_cell_and_makes_nothing(store):
    quiet = CliRunner().invoke(app, ["--root", str(store.root), "plan"])
    assert quiet.exit_code == 0 and "Everything is up to date" in quiet.output
    shutil.rmtree(store.artifact("textual_inversion", "rex"))
    said = CliRunner().invoke(app, ["--root", str(store.root), "plan", "rex"])
    assert said.exit_code == 0 and "has not been trained" in said.output
    assert not store.artifact("textual_inversion", "rex").exists()
