"""The step of the analyses: one folder, whole, with numbers, tables and images, or why they are not defined."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from personalize_core import steps
from personalize_core.analyses import learned_embedding
from personalize_core.cli import main as command_line
from personalize_core.concepts.image_files import load_image
from personalize_core.errors import InputError
from personalize_core.metrics import parquet
from personalize_core.metrics.encoders import load_identity_encoder
from personalize_core.steps import analyses, canary
from personalize_core.steps.analyses import ALL
from personalize_core.steps.events import unheard
from personalize_core.training import training_log
from personalize_core.tuning.scratch import scratch
from personalize_core.workspace.stamps.training import concept_for, train_stamp
from personalize_core.workspace.store import Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks")

METHODS = ["base_model", "textual_inversion", "personalized_residuals"]
MACRO_CLASS = "personalized_residuals@wordnet_macro_class"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one concept has been trained, drawn, scored and analysed."""
    store = tiny_workspace.make(tmp_path_factory.mktemp("analysed"))
    for method in METHODS:
        for one in (steps.train, steps.sample_grid, steps.score):
            one(store, "rex", method)
    for method in METHODS:
        assert not steps.analyse(store, "rex", method).skipped
    return store.root


@pytest.fixture
def store(analysed: Path, tmp_path: Path) -> Store:
    shutil.copytree(analysed / "data", tmp_path / "data")
    shutil.copy(analysed / "params.yaml", tmp_path / "params.yaml")
    return Store(tmp_path)


def found(store: Store, method: str) -> dict[str, Any]:
    return json.loads((store.analyses(method, "rex") / steps.ANALYSES).read_text())["analyses"]


def metrics_in(value: Any) -> list[float]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, float) else [number for one in inside for number in metrics_in(one)]


@pytest.mark.parametrize("method", METHODS)
def test_every_analysis_is_there_or_says_why_not_and_every_file_has_a_caption(method, store: Store):
    analyses, folder = found(store, method), store.analyses(method, "rex")
    assert set(analyses) == set(ALL)
    named = {"analyses.json", "manifest.json"}
    for one in analyses.values():
        assert one["title"] and one["how"]
        if "not_defined" in one:
            assert len(one["not_defined"]) > 20 and "metrics" not in one
            continue
        assert one["tables"] and one["images"]
        for file in one["tables"] + one["images"]:
            assert file["caption"]
            named.add(file["file"])
    assert {path.name for path in folder.iterdir()} == named
    assert all(math.isfinite(number) for number in metrics_in(analyses))
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 200 and image.height > 100
    for path in folder.glob("*.parquet"):
        assert set(parquet.meanings_in(path)) == set(parquet.read_parquet(path).columns)


def test_what_is_not_defined_for_a_method_says_why(store: Store):
    undefined = {method: {n for n, one in found(store, method).items() if "not_defined" in one} for method in METHODS}
    for method in METHODS:  # both prompts of the list are scenes; ViCo is not among them
        undefined[method] -= {"per_kind", "object_masks"}
    floor = {"absence", "drift", "embedding_drift", "bare_placeholder", "context_tokens"}
    assert undefined["base_model"] == floor
    assert undefined["personalized_residuals"] - {"absence"} == {"embedding_drift", "bare_placeholder"}
    assert undefined["textual_inversion"] <= {"absence"}  # a random encoder may not tell the two kinds of image
    assert "learns no embedding" in found(store, "personalized_residuals")["bare_placeholder"]["not_defined"]


def test_an_embedding_leaves_other_prompts_alone_and_weights_in_the_u_net_do_not(store: Store):
    untouched = parquet.read_parquet(store.analyses("textual_inversion", "rex") / "drift.parquet")
    assert untouched["pixel_difference"].to_list() == [0.0] * 6  # two templates, three nouns
    assert untouched["feature_distance"].to_list() == pytest.approx([0.0] * 6, abs=1e-6)
    moved = parquet.read_parquet(store.analyses("personalized_residuals", "rex") / "drift.parquet")
    plain = moved.filter(variant="personalized_residuals")["pixel_difference"]
    assert plain.max() > 0  # type: ignore[operator]
    confined = moved.filter(variant="personalized_residuals_lag", kind="other noun")["pixel_difference"]
    assert confined.to_list() == [0.0] * 4  # LAG looks for the concept's words, and there are none


def test_the_nearest_concept_image_is_that_of_the_encoder_itself(store: Store):
    """A second way through: sampled and concept images encoded here, and compared in a loop."""
    encoder, folder = load_identity_encoder(store.params.encoders.identity[0]), store.concept_folder("rex")
    concept_images = sorted(folder.glob("*.png"))
    seen = encoder.images([load_image(path) for path in concept_images]).double().numpy()
    grid = store.grid("textual_inversion", "rex")
    table = parquet.read_parquet(store.analyses("textual_inversion", "rex") / "copying.parquet")
    mine = table.filter(variant="textual_inversion", encoder=encoder.name)
    assert len(mine) == 4
    for row in mine.iter_rows(named=True):
        image = encoder.images([load_image(grid / row["image"])]).double().numpy()[0]
        cosines = [float(image @ concept_image) for concept_image in seen]
        assert row["similarity"] == pytest.approx(max(cosines), abs=1e-6)
        assert row["nearest"] == concept_images[int(np.argmax(cosines))].name


def test_several_methods_stand_in_one_figure_those_without_an_embedding_in_the_first_alone(store: Store):
    report = steps.analyse_together(store, "rex", METHODS)
    assert {path.name for path in report.images.values()} == {
        "context_tokens_of_all.png",
        "embedding_drift_of_all.png",
    }
    rows = parquet.read_parquet(report.path / "context_tokens.parquet")
    concept = rows.filter(kind="concept")["filler"].unique().sort().to_list()
    assert concept == ["<rex> dog, Personalized Residuals", "<rex>, Textual Inversion"]
    assert len(rows) == (1 + 2 + 1 + 2) * 4  # the class noun, two near nouns, a far one, two methods; four words
    assert rows["kind"].unique(maintain_order=True).to_list() == ["class noun", "near noun", "far noun", "concept"]
    assert steps.analyse_together(store, "rex", METHODS).skipped
    assert not steps.analyse_together(store, "rex", METHODS[:2]).skipped
    with pytest.raises(InputError, match="oft has not been analysed on 'rex'"):
        steps.analyse_together(store, "rex", ["oft", "base_model"])


def test_the_command_shows_every_number_or_why_there_is_none(store: Store, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(store.root), *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    printed = run("analyse", "rex")  # all that have drawn
    assert "learns no embedding" in printed and "nearest_pairs_pixels_personalized_residuals_lag.png" in printed
    assert printed.index("Prompt by prompt") < printed.index("Copying") < printed.index("Context tokens")
    assert "rex, all these methods" in printed and "nan" not in printed
    printed = run("suggest-class", "rex", "--nouns", "common", "--top", "1")
    ranked = [line for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert ranked[0].split()[0] == "1" and "the present class noun" in printed


def test_analyses_are_made_once_and_again_when_what_they_look_at_changed(store: Store):
    assert steps.analyse(store, "rex", "textual_inversion").skipped
    shutil.rmtree(store.scores("base_model", "rex"))
    shutil.rmtree(store.grid("base_model", "rex"))
    assert not steps.analyse(store, "rex", "textual_inversion").skipped
    analyses = found(store, "textual_inversion")
    assert "evaluate rex -m base_model" in analyses["absence"]["not_defined"]
    assert "base model" in analyses["diversity"]["absent"]["base_model"]
    assert "difference" in analyses["per_prompt"]["absent"]
    images = [path for path in store.concept_folder("rex").glob("*.*") if path.suffix != ".yaml"]
    (store.concept_folder("rex") / "masks").mkdir()
    for path in images:
        with Image.open(path) as image:
            Image.new("L", image.size, 255).save(store.concept_folder("rex") / "masks" / f"{path.stem}.png")
    assert not steps.analyse(store, "rex", "textual_inversion").skipped
    assert steps.analyse(store, "rex", "textual_inversion").skipped


def test_a_concept_of_one_concept_image_has_no_held_out_ones(store: Store):
    folder = store.concept_folder("rex")
    for path in sorted(folder.glob("*.png"))[1:]:
        path.unlink()
    steps.analyse(store, "rex", "textual_inversion")
    analyses = found(store, "textual_inversion")
    assert "one concept image" in analyses["copying"]["absent"]["held out"]
    assert "one concept image" in analyses["absence"]["not_defined"]
    table = parquet.read_parquet(store.analyses("textual_inversion", "rex") / "copying.parquet")
    assert table["with_one_left_out"].null_count() == len(table)


def test_what_has_not_been_trained_or_sampled_is_refused_and_writes_nothing(store: Store):
    with pytest.raises(InputError, match="dreambooth has not been trained on 'rex'"):
        steps.analyse(store, "rex", "dreambooth")
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    values["sampling"]["steps"] = 3
    other = tiny_workspace.write_params(store.root, values)
    before = (store.analyses("textual_inversion", "rex") / steps.ANALYSES).read_bytes()
    with pytest.raises(InputError, match="was not sampled as params.yaml says now"):
        steps.analyse(other, "rex", "textual_inversion")
    assert (store.analyses("textual_inversion", "rex") / steps.ANALYSES).read_bytes() == before
    shutil.rmtree(store.grid("textual_inversion", "rex"))
    with pytest.raises(InputError, match="has sampled no grid of 'rex'; run `personalize evaluate rex"):
        steps.analyse(store, "rex", "textual_inversion")
    assert not store.analyses("dreambooth", "rex").exists()


def test_the_log_of_a_training_holds_the_nearest_words_and_the_weights_are_as_without(store: Store, monkeypatch):
    folder = store.artifact("textual_inversion", "rex")
    rows, weights = training_log.read(folder), (folder / "weights.safetensors").read_bytes()
    read = [row["learned"]["read"] for row in rows if "read" in row["learned"]]
    assert read and all(len(one["near"][0]) == learned_embedding.WORDS for one in read)
    during = parquet.read_parquet(store.analyses("textual_inversion", "rex") / "words_during_training.parquet")
    assert during["step"].n_unique() == len(read)
    last = parquet.read_parquet(store.analyses("textual_inversion", "rex") / "nearest_words.parquet")
    mine = during.filter(step=len(rows) - 1).sort("rank")["word"].to_list()
    assert mine == last.filter(when="after").sort("rank")["word"].to_list()
    assert "learned" not in training_log.read(store.artifact("personalized_residuals", "rex"))[-1]
    shutil.rmtree(folder)
    monkeypatch.setattr(learned_embedding.WhileTraining, "__call__", lambda self, done: None)
    assert not steps.train(store, "rex", "textual_inversion").skipped
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert not [row for row in training_log.read(folder) if "read" in row["learned"]]


def test_suggested_nouns_are_ranked_and_their_texts_encoded_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    report = steps.suggest_class(store, "rex", "common")
    rows = parquet.read_parquet(report.path / "class_nouns.parquet")
    assert len(rows) == 16 and rows["score"].is_sorted(descending=True)
    assert rows.filter(is_class_noun=True)["noun"].to_list() == ["dog"]
    assert (report.path / "class_nouns.png").is_file()
    assert steps.suggest_class(store, "rex", "common").skipped
    from personalize_core.analyses import class_nouns

    monkeypatch.setattr(class_nouns, "matrix", lambda *arguments: pytest.fail("encoded again"))
    steps.suggest_class(store, "cup", "common")
    nouns = store.root / "nouns.txt"
    nouns.write_text("mug\n")
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        steps.suggest_class(store, "cup", str(nouns))
    assert steps.suggest_class(store, "rex", "common").skipped  # what was there is there still


def test_the_macro_class_of_wordnet_is_the_first_of_the_suggested_nouns(store: Store):
    """Said in training and in sampling; another suggestion makes what was trained stale."""
    method = MACRO_CLASS
    with pytest.raises(InputError, match="`personalize suggest-class rex` ranks first, which has not been run"):
        steps.train(store, "rex", method)
    (problem,) = steps.problems_of(store, ["rex"], [method])
    assert "run it first" in str(problem)
    nouns = store.root / "nouns.txt"
    nouns.write_text("teddy bear\n")
    steps.suggest_class(store, "rex", str(nouns))
    assert steps.problems_of(store, ["rex"], [method]) == []
    report = steps.train(store, "rex", method)
    described = json.loads((report.path / "config.json").read_text())
    assert described["concept"]["class_noun"] == "teddy bear" and described["phrase"] == "<rex> teddy bear"
    assert store.concept("rex").class_noun == "dog"
    sampled = steps.sample_prompts(store, "rex", method, ["a photo of a <rex>"], images=1)
    assert json.loads((sampled.path / "samples.json").read_text())["prompts"] == ["a photo of a <rex> teddy bear"]
    assert steps.train(store, "rex", method).skipped
    nouns.write_text("mug\n")
    steps.suggest_class(store, "rex", str(nouns))
    assert not steps.train(store, "rex", method).skipped


def test_analyses_know_whether_the_concept_images_are_those_that_were_trained_on(store: Store):
    inputs_of = analyses._inputs
    assert inputs_of(store, "rex", "textual_inversion", unheard).trained_on_these
    Image.new("RGB", (32, 32), "teal").save(min(store.concept_folder("rex").glob("*.png")))  # as many, but others
    assert not inputs_of(store, "rex", "textual_inversion", unheard).trained_on_these


@pytest.fixture
def suggested(tmp_path: Path) -> Store:
    """A workspace in which a noun has been suggested, and nothing else been done."""
    store = tiny_workspace.make(tmp_path)
    (tmp_path / "nouns.txt").write_text("teddy bear\n")
    steps.suggest_class(store, "rex", str(tmp_path / "nouns.txt"))
    return store


def test_the_suggested_noun_is_the_same_under_a_protocol_in_a_repeat_in_a_search_and_in_the_canary(suggested):
    protocol = suggested.data / "protocols" / "other.yaml"
    protocol.parent.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parents[2] / "data" / "protocols" / "mini.yaml", protocol)
    searched = scratch(suggested, suggested.root / "search", MACRO_CLASS, MACRO_CLASS, {}, ["rex"])
    for other in (
        replace(suggested, protocol="other"),
        suggested.again(1),
        searched,
        canary._scratch(suggested, ["rex"]),
    ):
        assert concept_for(other, "rex", MACRO_CLASS).class_noun == "teddy bear", other


def test_a_noun_that_other_concept_images_suggested_is_refused(suggested):
    Image.new("RGB", (32, 32), "teal").save(min(suggested.concept_folder("rex").glob("*.png")))
    with pytest.raises(InputError, match="`personalize suggest-class rex`.* other concept images .*run it again"):
        train_stamp(suggested, "rex", MACRO_CLASS)
    steps.suggest_class(suggested, "rex", str(suggested.root / "nouns.txt"))
    assert concept_for(suggested, "rex", MACRO_CLASS).class_noun == "teddy bear"
