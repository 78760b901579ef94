"""The pipeline asks the core for the right thing, and shows what it is told. The steps themselves are stand-ins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from personalize_core import steps
from personalize_core.workspace.store import Store
from pipelines.__main__ import app, prepare
from pipelines.assets import asset_defaults, chain
from pipelines.definitions import defs
from pipelines.partitions import CONCEPT
from pipelines.presentation import metadata
from pipelines.server import services
from tests.in_dagster import materialize, passing
from tests.watching import choose, concept

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

ROOT = Path(__file__).parents[2]
PAIR = dg.MultiPartitionKey({"concept": "dog7", "method": "textual_inversion"})


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the steps were asked, in order."""
    asked = []

    def stand_in(name):
        def step(store, *arguments):
            *what, listener = arguments
            asked.append((name, *what))
            listener(steps.Event(name, 1, 1, {"loss": 0.5}))
            return steps.Report(stamp=f"stamp of {name}", skipped=False, seconds=1.0, path=tmp_path)

        return step

    for name in (
        "encode_images", "make_class_images", "train", "sample_grid", "score", "score_references", "compare", "report",
    ):  # fmt: skip
        monkeypatch.setattr(steps, name, stand_in(name))
    monkeypatch.setattr(
        steps, "check_inputs", lambda store, concepts, methods: asked.append(("check", *concepts, *methods))
    )
    monkeypatch.setattr(steps, "plan", lambda store, concepts, methods: [])
    monkeypatch.setattr(steps, "long_work_notice", lambda store, plan: None)
    for name in ("recipe_stamp", "sampling_stamp", "scoring_stamp"):
        monkeypatch.setattr(steps, name, lambda *arguments: "settings")
    for name in ("loss_curve", "scores_by_prompt"):
        monkeypatch.setattr(metadata, name, lambda report: {})
    for name in ("latents", "artifact", "grid", "scores", "identity", "comparison"):
        monkeypatch.setattr(steps.result_checks, name, passing(name))
    return asked


# What is asked


def test_a_partition_trains_samples_and_scores_its_own_concept_with_its_own_method(instance, asked, tmp_path):
    result = materialize(instance, tmp_path, [chain.artifact, chain.image_grid, chain.metrics], PAIR)
    assert result.success
    assert asked == [(step, "dog7", "textual_inversion") for step in ("check", "train", "sample_grid", "score")]


def test_a_concept_partition_prepares_its_own_concept(instance, asked, tmp_path):
    concept(tmp_path / "data" / "concepts", "dog7")
    materialize(instance, tmp_path, [chain.latents, chain.class_images, chain.reference_scores], "dog7")
    assert sorted(asked) == [("encode_images", "dog7"), ("make_class_images", "dog"), ("score_references", "dog7")]


def test_the_sensor_reads_the_workspace_of_the_current_folder(instance, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    repository = defs.get_repository_def()
    sensor, resources = repository.get_sensor_def("concept_folder"), repository.get_top_level_resources()
    with dg.build_sensor_context(instance=instance, resources=resources) as context:
        assert json.loads(sensor.evaluate_tick(context).cursor or "")["seen"] == {}


def test_the_comparison_is_made_once_over_everything(instance, asked, tmp_path):
    assert materialize(instance, tmp_path, [chain.comparison]).success
    assert asked == [("compare",)]


def test_the_report_is_written_after_the_comparison_that_it_tells_of(instance, asked, tmp_path):
    assert materialize(instance, tmp_path, [chain.report, chain.comparison]).success
    assert asked == [("compare",), ("report",)]


def test_the_data_version_is_the_stamp_of_the_step(instance, asked, tmp_path):
    result = materialize(instance, tmp_path, [chain.artifact], PAIR)
    event = result.asset_materializations_for_node("artifact")[0]
    assert (event.tags or {})["dagster/data_version"] == "stamp of train"


def test_what_fails_in_a_step_fails_the_run(instance, asked, tmp_path, monkeypatch):
    def train(*arguments):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(steps, "train", train)
    with pytest.raises(FloatingPointError):
        materialize(instance, tmp_path, [chain.artifact, chain.image_grid], PAIR)
    assert asked == [("check", "dog7", "textual_inversion")]


# The definitions


def test_the_definitions_are_valid():
    dg.Definitions.validate_loadable(defs)


def test_a_selection_written_as_text_is_understood():
    """With the parser that DVC alone would install, each of these dies with a TypeError."""
    selection = dg.AssetSelection.from_string('key:"artifact"+')
    chosen = selection.resolve([a for a in chain.ALL if isinstance(a, dg.AssetsDefinition)])
    assert {key.to_user_string() for key in chosen} == {"artifact", "image_grid", "metrics", "comparison", "report"}


def test_work_for_the_graphics_card_waits_in_its_pool():
    for asset in chain.ALL:
        if isinstance(asset, dg.AssetsDefinition) and asset not in (chain.comparison, chain.report):
            assert asset.op.pool == asset_defaults.GPU, asset.key


def test_every_asset_says_what_it_is_and_whose():
    for spec in defs.resolve_all_asset_specs():
        assert spec.description and spec.owners and spec.kinds and spec.group_name != "default", spec.key


# The metadata


def noisy_image(path: Path, size: tuple[int, int]) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("size", [(64, 64), (1800, 700), (300, 2000)])
def test_a_image_has_a_thumbnail_short_enough_to_stand_in_the_page(tmp_path, size):
    shown = metadata.image("grid", noisy_image(tmp_path / "grid.png", size))
    preview, grid = str(shown["grid_preview"].value), str(shown["grid"].value)
    assert preview.startswith("![grid](data:image/webp;base64,") and len(preview) < 1000
    assert len(preview) < len(grid) < metadata.BEHIND_LINK * 4 / 3 + 100


def test_a_comparison_of_many_concepts_does_not_bury_the_page(tmp_path):
    choose(tmp_path)
    path = noisy_image(tmp_path / "any.png", (64, 64))
    names = [f"{kind}_c{i:03d}" for i in range(100) for kind in ("grid", "identity_vs_text")]
    images = dict.fromkeys([*names, "identity_vs_text"], path)
    report = steps.Report("stamp", False, 1.0, tmp_path, {}, images)
    shown = dict(metadata.overview(dg.build_asset_context(), Store(tmp_path), report).metadata or {})
    assert list(shown)[:4] == ["identity_vs_text_preview", "identity_vs_text", "grid_c000_preview", "grid_c000"]
    assert len([name for name in shown if name.startswith("grid")]) == 2 * metadata.MOST_GRIDS


@pytest.mark.parametrize(("stamp", "rewritten", "shrunk"), [("s", False, 1), ("s", True, 2), ("another", False, 2)])
def test_a_image_that_is_as_it_was_shown_is_not_shrunk_again(
    stamp, rewritten, shrunk, instance, asked, tmp_path, monkeypatch
):
    choose(tmp_path)
    grid = noisy_image(tmp_path / "grid.png", (64, 64))
    images, counted = {"grid": grid}, []
    small = metadata.image("grid", grid)
    monkeypatch.setattr(metadata, "image", lambda *what: counted.append(what) or small)

    def materialized(report: steps.Report) -> dict:
        monkeypatch.setattr(steps, "sample_grid", lambda *arguments: report)
        (event,) = materialize(instance, tmp_path, [chain.image_grid], PAIR).get_asset_materialization_events()
        return dict(event.materialization.metadata)

    before = materialized(steps.Report("s", False, 1.0, tmp_path, {}, images))
    if rewritten:
        grid.write_bytes(grid.read_bytes())
    again = materialized(steps.Report(stamp, True, 0.0, tmp_path, {}, images))
    assert len(counted) == shrunk
    assert all(again[name] == before[name] for name in ("grid", "grid_preview")) and list(again)[0] == "grid_preview"


@pytest.mark.parametrize("steps_taken", [1, 7, 150, 4000])
def test_a_loss_curve_is_short_enough_to_stand_in_the_page(tmp_path, steps_taken):
    losses = np.random.default_rng(0).random(steps_taken)
    rows = [{"stage": "all", "step": i, "diffusion": float(loss)} for i, loss in enumerate(losses)]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = metadata.loss_curve(steps.Report("stamp", False, 1.0, tmp_path))
    assert len(str(shown["loss_preview"].value)) < 1000
    assert {"loss_first_tenth", "loss_last_tenth", "training_steps"} < shown.keys()


def test_a_method_that_trains_nothing_has_no_loss_curve(tmp_path):
    (tmp_path / "train_log.jsonl").write_text("")
    assert metadata.loss_curve(steps.Report("stamp", False, 1.0, tmp_path)) == {}


# The UI's instance


def test_what_the_ui_prepares_is_there_when_it_is_opened_again(tmp_path, monkeypatch, capsys):
    """With no environment variable set: the instance is the one that dagster.yaml describes."""
    concept(tmp_path / "data" / "concepts", "dog7")
    (tmp_path / "data" / "concepts" / "Not A Name").mkdir()
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for _ in range(2):
        prepare(gpus=1)
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            assert instance.get_dynamic_partitions(CONCEPT) == ["dog7"]
            assert instance.event_log_storage.get_concurrency_info(asset_defaults.GPU).slot_count == 1
    assert "'Not A Name'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".dagster", "dagster.yaml", "data"}


def test_the_services_write_bytecode_also_in_a_container_that_asks_for_none(tmp_path, monkeypatch):
    """Without it the process of each run compiles all sources of this project."""
    for name in ("dagster.yaml", "workspace.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(services, "run", lambda started, environment: asked.append(environment) or 0)
    assert CliRunner().invoke(app, ["ui"]).exit_code == 0
    (environment,) = asked
    assert "PYTHONDONTWRITEBYTECODE" not in environment and environment["DAGSTER_HOME"] == str(tmp_path)
