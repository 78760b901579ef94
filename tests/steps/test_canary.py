"""After an upgrade a few cells run again, apart from all results; a score that leaves its noise is a failed check."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from personalize_core import steps
from personalize_core.cli.main import app
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json, write_json
from personalize_core.steps import canary as core
from personalize_core.workspace.store import Store
from pipelines.assets import canary
from pipelines.automation import schedules
from pipelines.resources import Workspace
from tests import tiny_workspace
from tests.watching import evening

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

CELL = "rex/textual_inversion"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose canary has run once."""
    root = tmp_path_factory.mktemp("canary")
    tiny_workspace.make(root)
    values = tiny_workspace.params(root) | {"automation": {"canary": {"rex": ["textual_inversion"]}}}
    store = tiny_workspace.write_params(root, values)
    assert steps.upgrades(store) is None
    steps.run_canary(store)
    return root


@pytest.fixture
def store(ran: Path, tmp_path: Path) -> Store:
    shutil.copytree(ran / "data", tmp_path / "data")
    shutil.copy(ran / "params.yaml", tmp_path / "params.yaml")
    return Store(tmp_path)


def upgrade(monkeypatch) -> None:
    installed = core._installed()
    monkeypatch.setattr(core, "_installed", lambda: installed | {"torch": "99.0"})


def before(store: Store, by: float) -> None:
    """As if the first run had scored otherwise."""
    path = store.data / "canary" / core.RECORD
    record = read_json(path)
    record["baseline"][CELL]["scores"]["textual_inversion.dino"] += by
    write_json(path, record)


def test_it_leaves_nothing_but_its_record(ran):
    store = Store(ran)
    assert not (store.data / "artifacts").exists() and not (store.data / "grids").exists()
    assert not store.work("canary").exists()
    record = read_json(store.data / "canary" / core.RECORD)
    assert set(record["baseline"]) == {CELL} and steps.moved(store) == []


def test_it_is_due_after_an_upgrade_of_any_package_and_not_before(store, monkeypatch):
    assert steps.upgrades(store) == {} and steps.why_canary(steps.upgrades(store)) == ""
    upgrade(monkeypatch)
    assert list(steps.upgrades(store) or {}) == ["torch"]
    assert "-> 99.0" in steps.why_canary(steps.upgrades(store))


def test_the_schedule_asks_for_it_only_when_it_is_due(store, monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()

    def asked() -> object:
        with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
            when = datetime.datetime(2026, 11, 22, 1, tzinfo=datetime.UTC)
            with evening(instance, Workspace(root=str(store.root)), when) as context:
                return schedules.canary_after_upgrade(context)

    assert isinstance(asked(), dg.SkipReason)
    upgrade(monkeypatch)
    request = asked()
    assert isinstance(request, dg.RunRequest) and "torch" in request.tags["personalize/why"]


def materialized(instance: dg.DagsterInstance, store: Store) -> dg.AssetCheckEvaluation:
    workspace = Workspace(root=str(store.root))
    result = dg.materialize([canary.canary], instance=instance, resources={"workspace": workspace})
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def test_the_same_scores_pass_and_one_beyond_its_band_fails_the_check_until_it_is_accepted(
    instance, store, monkeypatch
):
    upgrade(monkeypatch)
    assert materialized(instance, store).passed
    before(store, core.TOLERANCE * 1.5)
    failed = materialized(instance, store)
    assert not failed.passed and "dino" in (failed.description or "") and CELL in (failed.description or "")
    assert CliRunner().invoke(app, ["--root", str(store.root), "canary", "--accept"]).exit_code == 0
    assert materialized(instance, store).passed


def test_the_band_is_the_measured_noise_where_there_is_one(store):
    import polars as pl

    from personalize_core.report.comparison_in_words import NOISE

    old, new = {"textual_inversion.dino": 0.5}, {"textual_inversion.dino": 0.56}
    assert len(core._moved(store, CELL, old, new)) == 1
    row = {"concept": "rex", "variant": "textual_inversion", "metric": "dino", "least": 0.1}
    store.comparison().mkdir(parents=True)
    pl.DataFrame([row, row | {"concept": "cup", "least": 0.001}]).write_parquet(store.comparison() / NOISE)
    assert core._moved(store, CELL, old, new) == []
    assert "noise of training" in core._moved(store, CELL, old, {"textual_inversion.dino": 0.7})[0]


@pytest.mark.parametrize("now", [{}, {"textual_inversion.dino": float("nan")}])
def test_a_score_that_is_gone_or_no_number_has_left_its_band(store, now):
    assert len(core._moved(store, CELL, {"textual_inversion.dino": 0.5}, now)) == 1


def test_another_recipe_is_no_upgrade_and_starts_anew(store):
    before(store, 1.0)
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    values["methods"]["textual_inversion"][values["base_model"]]["lr"] = 0.1
    values |= {"automation": {"canary": {"rex": ["textual_inversion"]}}}
    store = tiny_workspace.write_params(store.root, values)
    steps.run_canary(store)
    assert steps.moved(store) == []
    before(store, 1.0)
    steps.run_canary(store)
    assert len(steps.moved(store)) == 1


def test_without_cells_it_says_where_to_write_them(store):
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    with pytest.raises(InputError, match="automation: { canary"):
        steps.run_canary(tiny_workspace.write_params(store.root, values))
