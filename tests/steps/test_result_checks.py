"""Gates tell good results from spoilt ones, and Dagster stops where later work would be wasted."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize_core import steps
from personalize_core.files.atomic import MANIFEST, read_json, write_json
from personalize_core.files.stamps import sha256
from personalize_core.metrics import parquet
from personalize_core.steps import result_checks
from personalize_core.steps.latents import MOMENTS
from personalize_core.steps.result_checks import Gate
from personalize_core.workspace.external_columns import ExternalColumn
from personalize_core.workspace.store import ABSENT, REFERENCES, SCORES, Store
from pipelines.assets import chain, checks
from pipelines.definitions import defs
from pipelines.presentation.lineage import dvc_hash, plain
from tests import tiny_workspace
from tests.in_dagster import materialize
from tests.steps.test_external import folder_of

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHOD = "dreambooth"
PAIR = dg.MultiPartitionKey({"concept": "rex", "method": METHOD})
LEARN = [chain.artifact, chain.image_grid, chain.metrics]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tiny_workspace.finished(tmp_path_factory.mktemp("finished"), ["rex"], ["base_model", METHOD])
    steps.compare(store)
    return store.root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished, tmp_path)


def add_column(store: Store, folder: Path) -> None:
    """Images that another program made, as the column flux of rex."""
    steps.add_external(store, "flux", "rex", ExternalColumn(folder=str(folder)))
    steps.score_external(store, "rex", "flux")


def failed(found: list[Gate]) -> dict[str, bool]:
    """The gates that did not let it through, and whether they are serious."""
    return {gate.name: gate.serious for gate in found if not gate.passed}


def test_good_results_pass_and_every_declared_check_is_among_the_gates(store, tmp_path):
    add_column(store, folder_of(tmp_path / "out"))
    found = {
        "artifact": result_checks.artifact(store, "rex", METHOD),
        "image_grid": result_checks.grid(store, "rex", METHOD),
        "metrics": [*result_checks.scores(store, "rex", METHOD), *result_checks.identity(store, "rex", METHOD)],
        "reference_scores": result_checks.scores(store, "rex", REFERENCES),
        "external_metrics": result_checks.scores(store, "rex", "flux"),
        "comparison": result_checks.comparison(store),
        "latents": result_checks.latents(store, "rex"),
    }
    assert {asset: [gate.name for gate in of] for asset, of in found.items()} == {
        asset: list(of) for asset, of in checks.OF_ASSETS.items()
    }
    # random weights: the autoencoder cannot say concept images, and three steps need not make anything more alike
    assert {name for of in found.values() for name in failed(of)} <= {"latents_decode", "identity_above_base_model"}
    assert not [gate for of in found.values() for gate in of if not gate.passed and gate.serious]


# Concept images


def test_concept_images_that_can_be_read_and_are_enough_pass(store):
    assert failed(result_checks.concept_images(store, "rex")) == {}


def test_few_concept_images_are_a_warning(store):
    (store.concept_folder("rex") / "0.png").unlink()
    assert failed(result_checks.concept_images(store, "rex")) == {"concept_images_usable": False}


def test_a_concept_image_that_cannot_be_read_is_serious(store):
    (store.concept_folder("rex") / "0.png").write_bytes(b"no image")
    (gate,) = result_checks.concept_images(store, "rex")
    assert not gate.passed and gate.serious and "0.png" in gate.said


# Latents


def change_latents(store: Store, change) -> None:
    (path,) = store.latents("rex").glob(f"crop*/{MOMENTS}")
    tensors = load_file(path)
    save_file(change(tensors), path)


def test_latents_that_are_not_finite_are_serious(store):
    def spoil(tensors):
        tensors["001"][0, 0, 0, 0, 0] = math.nan
        return tensors

    change_latents(store, spoil)
    assert failed(result_checks.latents(store, "rex"))["latents_finite"]


def test_latents_of_another_concept_image_are_serious(store):
    change_latents(store, lambda tensors: {"000": tensors["001"], "001": tensors["000"], "002": tensors["002"]})
    (decode,) = [gate for gate in result_checks.latents(store, "rex") if gate.name == "latents_decode"]
    assert not decode.passed and decode.serious and "0.png" in decode.said


def test_an_autoencoder_that_cannot_say_concept_images_is_a_warning(store):
    assert failed(result_checks.latents(store, "rex")) == {"latents_decode": False}


def test_an_autoencoder_that_can_passes(store, monkeypatch):
    monkeypatch.setattr(result_checks, "LEAST_PSNR", 1.0)
    assert failed(result_checks.latents(store, "rex")) == {}


def test_the_same_latents_are_looked_at_once(store, monkeypatch):
    first = result_checks.latents(store, "rex")
    monkeypatch.setattr(result_checks, "load_base", lambda store: pytest.fail("the base model was loaded again"))
    assert result_checks.latents(store, "rex") == first


def test_latents_that_were_damaged_since_they_were_looked_at_are_looked_at_again(store):
    assert failed(result_checks.latents(store, "rex")) == {"latents_decode": False}
    change_latents(store, lambda tensors: {name: tensor * math.nan for name, tensor in tensors.items()})
    assert failed(result_checks.latents(store, "rex"))["latents_finite"]


def test_decibels_are_those_of_the_definition():
    one, other = torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 25.5)
    assert result_checks._psnr(one, other) == pytest.approx(20.0)


# Artifacts


def test_a_loss_that_is_not_finite_is_serious(store):
    log = store.artifact(METHOD, "rex") / "train_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["diffusion"] = math.inf
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert failed(result_checks.artifact(store, "rex", METHOD))["loss_finite"]


@pytest.mark.parametrize(("after", "low", "serious"), [(0.9, 0.05, None), (1.0, -0.01, False), (1.7, -0.9, True)])
def test_a_loss_that_does_not_fall_warns_and_one_that_diverges_is_serious(store, after, low, serious):
    fixed = {"before": 1.0, "after": after, "fell_by": 1.0 - after, "interval_95": [low, low + 0.1], "rows": 10}
    folder = store.artifact(METHOD, "rex")
    write_json(folder / "fixed_batch.json", fixed)
    assert result_checks._loss_falls(folder, "loss_falls").passed == (serious is None)
    assert failed([result_checks._loss_falls(folder, "loss_falls")]) == (
        {} if serious is None else {"loss_falls": serious}
    )


def test_an_artifact_whose_weights_were_changed_is_serious(store):
    weights = store.artifact(METHOD, "rex") / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (restores,) = [gate for gate in result_checks.artifact(store, "rex", METHOD) if not gate.passed]
    assert restores.name == "artifact_restores" and restores.serious and "weights.safetensors" in restores.said


def test_the_base_model_alone_has_nothing_to_show(store):
    assert failed(result_checks.artifact(store, "rex", "base_model")) == {}


# Grids and scores


def test_a_grid_with_a_image_missing_or_of_one_colour_is_serious(store):
    folder = store.grid(METHOD, "rex") / METHOD
    (folder / "00_00.png").unlink()
    assert failed(result_checks.grid(store, "rex", METHOD)) == {"grid_complete": True}
    Image.new("RGB", (16, 16), (7, 7, 7)).save(folder / "00_00.png")
    assert failed(result_checks.grid(store, "rex", METHOD)) == {"grid_not_constant": True}


def change_scores(store: Store, method: str, change) -> None:
    path = store.scores(method, "rex") / SCORES
    parquet.write_parquet(change(parquet.read_parquet(path)), path, parquet.meanings_in(path))


@pytest.mark.parametrize("method", [METHOD, REFERENCES])
def test_a_score_that_cannot_be_is_serious(store, method):
    change_scores(store, method, lambda table: table.with_columns(pl.col("score") * 0 + 1.5))
    assert failed(result_checks.scores(store, "rex", method)) == {"scores_in_range": True}


def test_a_image_without_a_score_is_serious_unless_there_is_a_reason(store):
    change_scores(store, METHOD, lambda table: table.filter((pl.col("metric") != "dino") | (pl.col("image_index") > 0)))
    assert failed(result_checks.scores(store, "rex", METHOD)) == {"scores_complete": True}
    folder = store.scores(METHOD, "rex")
    lost = parquet.read_parquet(folder / SCORES).filter(metric="clip_i", image_index=0)["image"].to_list()
    reasons = [{"metric": "dino", "encoder": None, "image": image, "reason": "lost"} for image in lost]
    write_json(folder / ABSENT, read_json(folder / ABSENT) + reasons)
    assert failed(result_checks.scores(store, "rex", METHOD)) == {}


def test_a_image_made_elsewhere_without_a_score_is_serious_unless_it_cannot_be_read(store, tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("elsewhere") / "out")
    (folder / "image_0_0.png").write_bytes(b"no image")
    add_column(store, folder)
    assert failed(result_checks.scores(store, "rex", "flux")) == {}
    change_scores(store, "flux", lambda table: table.filter((pl.col("metric") != "dino") | (pl.col("image_index") > 0)))
    assert failed(result_checks.scores(store, "rex", "flux")) == {"scores_complete": True}


def test_only_the_prompts_that_identity_leaves_out_are_excused_where_there_are_more_than_a_hundred(store):
    values = tiny_workspace.params_of(Path(store.params.base_model).parents[1], ["base_model", METHOD])
    values["sampling"]["prompts"] = [{"name": "many", "without_identity": [11]}]
    (store.data / "prompts" / "many.txt").write_text("".join(f"a photo of a {{}}, {index}\n" for index in range(102)))
    store, folder = tiny_workspace.write_params(store.root, values), store.grid(METHOD, "rex")
    described = {"templates": ["a photo of a {}"] * 102, "images_per_prompt": 1, "variants": [METHOD]}
    write_json(folder / "grid.json", read_json(folder / "grid.json") | described)
    where = folder.relative_to(store.root).as_posix()
    images = [f"{where}/{METHOD}/{index:02d}_00.png" for index in range(102) if index not in (10, 100)]
    about = {"metric": "dino", "encoder": "one", "references": "all concept images"}
    table = pl.DataFrame([about | {"image": image} for image in images])
    assert result_checks._lacking(store, table, [], "rex", METHOD) == [f"dino of {where}/{METHOD}/100_00.png"]


@pytest.mark.parametrize(("better", "expected"), [(0.3, {}), (-0.3, {"identity_above_base_model": False})])
def test_identity_below_the_base_models_is_a_warning(store, better, expected):
    floor = parquet.read_parquet(store.scores("base_model", "rex") / SCORES).filter(metric="dino")["score"].mean()
    assert isinstance(floor, float)
    change_scores(store, METHOD, lambda table: table.with_columns(score=pl.lit(floor + better)))
    assert failed(result_checks.identity(store, "rex", METHOD)) == expected


def test_a_comparison_that_lacks_a_cell_warns(store):
    path = store.comparison() / "summary.json"
    write_json(path, read_json(path) | {"missing": ["oft/rex"]})
    assert failed(result_checks.comparison(store)) == {"comparison_complete": False}


# In Dagster


def test_the_name_of_a_file_is_no_markdown():
    hostile = "![x](http://a.b/c.png) `code` <img src=x> *a* [b](c) _d_"
    rendered = MarkdownIt("commonmark").render(f"- {plain(hostile)}: **{plain(hostile)}**")
    text = html.escape(hostile, quote=False)
    assert rendered.split() == f"<ul> <li>{text}: <strong>{text}</strong></li> </ul>".split()


def test_what_the_command_line_made_dagster_finds_done_checks_and_explains(store, instance):
    result = materialize(instance, store.root, LEARN, PAIR, raise_on_error=False)
    assert result.success
    events = {
        event.materialization.asset_key.to_user_string(): event for event in result.get_asset_materialization_events()
    }
    said = {name: event.materialization.metadata for name, event in events.items()}
    assert all(metadata["skipped"].value for metadata in said.values())
    assert said["metrics"]["explain"].value == "personalize explain data/metrics/dreambooth/rex"
    for name, about in (("artifact", "0.png"), ("image_grid", "data/artifacts/dreambooth/rex"), ("metrics", "seed 5")):
        assert plain(about) in str(said[name]["made_from"].value)
    assert said["artifact"]["dvc/latents"].value == dvc_hash(store.latents("rex"))
    assert said["image_grid"]["dvc/artifact"].value == dvc_hash(store.artifact(METHOD, "rex"))
    names = {check.check_name for check in result.get_asset_check_evaluations()}
    assert names == {name for asset in ("artifact", "image_grid", "metrics") for name in checks.OF_ASSETS[asset]}


def test_a_serious_gate_stops_the_run_before_the_next_asset(store, instance):
    log = store.artifact(METHOD, "rex") / "train_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["diffusion"] = math.inf
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = read_json(log.parent / MANIFEST)  # as a step that wrote it so, and called it up to date
    manifest["files"][log.name] = {"bytes": log.stat().st_size, "sha256": sha256(log)}
    write_json(log.parent / MANIFEST, manifest)
    result = materialize(instance, store.root, LEARN, PAIR, raise_on_error=False)
    assert not result.success
    made = {event.materialization.asset_key.to_user_string() for event in result.get_asset_materialization_events()}
    assert made == {"artifact"}


def test_a_warning_stops_nothing(store, instance):
    change_scores(
        store, METHOD, lambda table: table.with_columns(score=pl.lit(-0.5)).filter(pl.col("scaling") == "plain")
    )
    result = materialize(instance, store.root, [chain.metrics], PAIR)
    warned = [check for check in result.get_asset_check_evaluations() if not check.passed]
    assert result.success and [check.check_name for check in warned] == ["identity_above_base_model"]


def test_concept_images_that_cannot_be_read_stop_the_run_before_their_latents(store, instance):
    (store.concept_folder("rex") / "0.png").write_bytes(b"no image")
    selection = dg.AssetSelection.assets(chain.latents) | dg.AssetSelection.checks(checks.concept_images_usable)
    result = materialize(instance, store.root, selection, "rex", raise_on_error=False)
    assert not result.success and not result.get_asset_materialization_events()
    (check,) = result.get_asset_check_evaluations()
    assert "0.png" in (check.description or "")


def test_the_job_that_prepares_a_concept_looks_at_its_concept_images_first():
    job = defs.resolve_job_def("prepare")
    assert "concept_images_concept_images_usable" in {node.name for node in job.all_node_defs}


def test_every_check_says_what_it_asks_and_every_asset_has_tags():
    assert all(said.endswith(".") for of in checks.OF_ASSETS.values() for _, said in of.values())
    assert all(spec.tags for spec in defs.resolve_all_asset_specs())
