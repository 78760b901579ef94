"""Results of the version whose modules lay loose: they are told of before they are replaced, and end in no traceback.

tests/steps/earlier_version holds the files of one small cell as that version wrote them (commit 959fb2c), images and
plots left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from personalize_core import steps
from personalize_core.cli.cells import over_cells
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, has_this_format, whole_folder, write_json
from personalize_core.report import evidence
from personalize_core.steps.events import Report
from personalize_core.workspace.lineage.differences import EARLIER
from personalize_core.workspace.store import Store

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "earlier_version"
CONCEPT, METHOD = CELL = ("backpack1", "textual_inversion")
ANALYSIS = {
    "title": "How far the embedding moved",
    "how": "Cosine with where it started.",
    "numbers": {"cosine": 0.25},
    "absent": {},
    "pictures": [{"file": "drift.png", "caption": "The cosine while it learned"}],
    "tables": [],
}


@pytest.fixture
def store(tmp_path) -> Store:
    """A workspace of that version: one concept, one method, on the embedded base model."""
    shutil.copytree(FILES, tmp_path / "data")
    shutil.copytree(ROOT / "data" / "concepts" / CONCEPT, tmp_path / "data" / "concepts" / CONCEPT)
    shutil.copytree(ROOT / "data" / "prompts", tmp_path / "data" / "prompts")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["methods"] = {METHOD: {"mini": {"steps": 2}}}
    values |= {"ablations": {}, "variants": {}}
    values["sampling"] |= {"steps": 2, "images_per_prompt": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    store = Store(tmp_path)
    for folder, name, content in (
        (store.analyses(METHOD, CONCEPT), "analyses.json", {"order": ["drift"], "analyses": {"drift": ANALYSIS}}),
        (store.samples(METHOD, CONCEPT, "0123456789abcdef"), "heat_maps.json", {"prompt": "a photo of <backpack1>"}),
    ):
        with whole_folder(folder, "its stamp") as new:
            write_json(new / name, content)
            (new / "heat_maps.png").write_bytes(b"")
        manifest = folder / MANIFEST
        manifest.write_text(manifest.read_text().replace('"format": 2,', ""))
    return store


def test_a_plan_says_that_an_earlier_version_made_it(store):
    (cell,) = steps.plan(store)
    assert (cell.concept, cell.method, cell.first, cell.why, cell.earlier) == (*CELL, "train", EARLIER, True)
    notice = steps.earlier_version_notice([cell])
    assert notice and "1 of 1 results" in notice and "1 trained anew, 0 sampled or scored anew" in notice
    assert "copy or move data/" in notice
    shutil.rmtree(store.artifact(METHOD, CONCEPT))
    assert steps.earlier_version_notice(steps.plan(store)) is None  # what is missing replaces nothing


def test_a_run_says_so_before_it_trains(store, capsys):
    told = []

    def step(store: Store, concept: str, method: str, listener: steps.Listener) -> Report:
        told.append(" ".join(capsys.readouterr().out.split()))
        return Report("stamp", False, 0.0, store.artifact(method, concept))

    over_cells(store, [CONCEPT], [METHOD], [step], processes=1)
    (before,) = told
    assert "were made by an earlier version of this program" in before and "copy or move data/" in before


@pytest.mark.parametrize("kind", ["artifacts", "grids", "metrics", "analyses", "samples"])
def test_it_is_explained(store, kind):
    folder = store.data / kind / METHOD / CONCEPT
    path = next(folder.iterdir()) if kind == "samples" else folder
    said = " ".join(steps.explain(store, path).all_problems())
    assert EARLIER in said or "earlier version" in said


def test_it_is_neither_compared_nor_reported(store):
    with pytest.raises(InputError, match="nothing has been scored .* by this version of the program"):
        steps.compare(store)
    assert evidence._analyses(store, METHOD, CONCEPT) == [] and evidence._heat_maps(store, METHOD, CONCEPT) == []
    with pytest.raises(InputError, match="no method has been analysed"):
        steps.analysed(store, CONCEPT)


def test_what_is_made_now_is_of_this_version(tmp_path):
    with whole_folder(tmp_path / "result", "a stamp"):
        pass
    assert has_this_format(tmp_path / "result") and not has_this_format(tmp_path / "none")
