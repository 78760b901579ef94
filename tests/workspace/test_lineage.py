"""From an image or a number to the bytes behind it, and what is said when one of them is another by now."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from personalize_core import steps
from personalize_core.cli.main import app
from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, read_json, write_json
from personalize_core.files.stamps import sha256
from personalize_core.metrics import parquet, tables
from personalize_core.steps import Link, Rows, make_class_images
from personalize_core.steps.class_images import encode_real_class_images
from personalize_core.workspace.lineage import making
from personalize_core.workspace.lineage.records import is_genuine
from personalize_core.workspace.store import SCORES, Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHOD, IMAGE = "dreambooth", "data/grids/dreambooth/rex/dreambooth/00_01.png"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tiny_workspace.finished(tmp_path_factory.mktemp("finished"), ["rex"], ["base_model", METHOD])
    steps.compare(store)
    return store.root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished, tmp_path)


def links(link: Link) -> list[Link]:
    return [link, *(further for each in link.inputs for further in links(each))]


def named(link: Link, what: str) -> Link:
    return next(each for each in links(link) if each.what == what)


# The chain


def test_a_image_is_explained_down_to_the_concept_images_and_the_base_model(store):
    link = steps.explain(store, store.root / IMAGE)
    chain = ["image", "grid", "artifact", "latents", "concept images"]
    assert [each.what for each in links(link)][:5] == chain
    assert {each.what.partition(" (")[0] for each in links(link)} == {
        *chain, "latents of class images", "class images", "base model"
    }  # fmt: skip
    assert link.all_problems() == []
    assert link.facts["sha256"] == sha256(store.root / IMAGE)
    assert link.facts["prompt"] == tiny_workspace.PROMPTS[0] and "prompt 0, image 1" in link.facts["noise"]
    concept_images = named(link, "concept images")
    assert concept_images.facts["sha256"]["0.png"] == sha256(store.concept_folder("rex") / "0.png")
    artifact = named(link, "artifact")
    assert artifact.facts["config"]["steps"] == 3 and artifact.facts["seed"] == 5
    assert (
        named(link, "base model").facts["weights_hash"]
        == read_json(store.artifact(METHOD, "rex") / "config.json")["base_model"]["weights_hash"]
    )


def test_every_result_says_when_by_which_code_and_libraries_and_on_what(store):
    for what in ("grid", "artifact", "latents", "class images"):
        found = named(steps.explain(store, store.root / IMAGE), what).making
        assert found["started"] <= found["finished"] and "CPU" in found["device"]
        assert {"torch", "diffusers"} < found["packages"].keys() and found["python"]


def test_the_code_is_named_by_its_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        run = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(making, "PACKAGE", package)
    git("init", "--quiet")
    assert making._commit() is None  # a checkout, but the package is no part of it
    git("add", "package")
    git("commit", "--quiet", "--message", "first")
    assert making._commit() == {"commit": git("rev-parse", "HEAD"), "changed_since": False}
    (tmp_path / "notes.txt").write_text("beside the package")
    assert making._commit() == {"commit": git("rev-parse", "HEAD"), "changed_since": False}
    (package / "__init__.py").write_text("changed = True")
    assert making._commit() == {"commit": git("rev-parse", "HEAD"), "changed_since": True}


def test_outside_of_a_checkout_no_commit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert making._commit() is None


def test_every_manifest_says_what_its_stamp_is_of(store):
    manifests = sorted(store.data.rglob(MANIFEST))
    assert len(manifests) >= 8
    assert [path for path in manifests if not is_genuine(read_json(path))] == []


def test_what_differs_from_run_to_run_is_in_no_manifest(store):
    for path in store.data.rglob(MANIFEST):
        assert not {"started", "packages", "device", "code"} & read_json(path).keys()


def test_a_result_from_before_manifests_said_so_is_explained_too(store):
    path = store.grid(METHOD, "rex") / MANIFEST
    write_json(path, {name: value for name, value in read_json(path).items() if name != "made_from"})
    link = steps.explain(store, store.root / IMAGE)
    assert link.all_problems() == [] and named(link, "concept images").facts["sha256"]


# What is another by now


def problems(store: Store, path: str = IMAGE) -> list[str]:
    return steps.explain(store, store.root / path).all_problems()


def test_a_image_that_was_changed_is_told_apart_from_its_neighbours(store):
    Image.new("RGB", (16, 16)).save(store.root / IMAGE)
    told = problems(store)
    assert any(words.startswith(f"image {IMAGE}: has been changed") for words in told)
    assert all("00_01.png" in words for words in told)
    assert problems(store, "data/artifacts/dreambooth/rex") == []


def test_a_file_that_no_step_made_is_said_to_be_so(store):
    stranger = store.grid(METHOD, "rex") / "stranger.png"
    Image.new("RGB", (16, 16)).save(stranger)
    assert any("no step has made this file" in words for words in problems(store, str(stranger)))


def test_a_image_of_a_prompt_that_there_is_not_is_a_stranger_too(store):
    stranger = store.grid(METHOD, "rex") / METHOD / "99_00.png"
    Image.new("RGB", (16, 16)).save(stranger)
    assert any("no step has made this file" in words for words in problems(store, str(stranger)))


def test_class_images_of_a_noun_with_capitals_are_not_taken_for_those_of_another(store):
    concept = store.concept_folder("rex") / "concept.yaml"
    concept.write_text(concept.read_text().replace("dog", "Dog"))
    make_class_images(store, "Dog")
    assert problems(store, "data/class_images/dog") == []
    (key,) = [path.name for path in store.class_latents("Dog", "").iterdir()]
    assert problems(store, f"data/class_images/dog.latents/{key}") == []


def test_concept_images_of_the_class_noun_that_were_changed_make_their_latents_stale(store):
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    values["methods"]["custom_diffusion"] = {store.params.base_model: {"regularization": "real", "steps": 3}}
    store = tiny_workspace.write_params(store.root, values)
    shutil.copytree(store.concept_folder("rex"), store.regularization("dog"))
    made = encode_real_class_images(store, "dog", "custom_diffusion", steps.unheard).path
    assert problems(store, str(made)) == []
    (store.regularization("dog") / "0.txt").write_text("another caption")
    assert [words.partition(": ")[2] for words in problems(store, str(made))] == [
        "stale: concept images changed: 0.png"
    ]


def test_a_concept_image_that_was_changed_makes_everything_behind_it_stale(store):
    Image.new("RGB", (32, 24)).save(store.concept_folder("rex") / "0.png")
    told = problems(store)
    assert "concept images data/concepts/rex: 0.png has been changed since" in told
    stale = [words.partition(" ")[0] for words in told if "stale" in words]
    assert stale == ["artifact", "latents"]  # the grid is of the artifact that is there
    assert all(words.endswith("stale: concept images changed: 0.png") for words in told if "stale" in words)


def test_a_recipe_that_was_changed_is_named_with_both_its_values(store):
    base = store.params.base_model
    values = tiny_workspace.params(Path(base).parents[1])
    values["sampling"]["guidance"] = 7.5
    values["seed"] = 6
    told = problems(tiny_workspace.write_params(store.root, values))
    assert any("stale: sampling changed: guidance 3.0 -> 7.5" in words for words in told if words.startswith("grid"))
    assert any("seed changed: 5 -> 6" in words for words in told if words.startswith("artifact"))


def test_what_is_gone_is_said_to_be_gone(store):
    shutil.rmtree(store.artifact(METHOD, "rex"))
    shutil.rmtree(store.concept_folder("rex"))
    told = problems(store)
    assert "artifact data/artifacts/dreambooth/rex: is gone" in told
    assert any("cannot be made again" in words for words in told)
    table = problems(store, "data/metrics/dreambooth/rex")
    assert "concept images data/concepts/rex: is gone" in table


def test_a_manifest_that_was_edited_is_found_out(store):
    path = store.artifact(METHOD, "rex") / MANIFEST
    manifest = read_json(path)
    manifest["made_from"]["seed"] = 99
    write_json(path, manifest)
    assert any("manifest has been edited" in words for words in problems(store))


@pytest.mark.parametrize(
    "change",
    [{"base_model": None}, {"concept": []}, {"versions": 7}, {"imported": 7}, {"concept": {"class_noun": 7}}],
    ids=str,
)
def test_an_artifact_whose_description_holds_values_of_another_kind_is_explained(change, store):
    path = store.artifact(METHOD, "rex") / "config.json"
    write_json(path, read_json(path) | change)
    assert any("config.json has been changed since it was made" in words for words in problems(store))


@pytest.mark.parametrize(
    "made_from", [{"latents": 7}, {"class_images": []}, {"sources": []}, {"latents": {"stamp": 7, "of": 7}}], ids=str
)
@pytest.mark.parametrize("kind", ["artifacts", "grids", "metrics"])
def test_a_manifest_that_says_values_of_another_kind_is_explained(kind, made_from, store):
    path = store.data / kind / METHOD / "rex" / MANIFEST
    manifest = read_json(path)
    write_json(path, manifest | {"made_from": manifest["made_from"] | made_from})
    assert any("manifest has been edited" in words for words in problems(store, f"data/metrics/{METHOD}/rex"))


@pytest.mark.parametrize("file", ["artifacts/{}/rex/config.json", "grids/{}/rex/grid.json"])
@pytest.mark.parametrize("content", ["[]", "7", '{"sampling": [], "parameters": 3}', '{"parameters": "many"}'])
def test_comparing_beside_a_description_that_is_none_is_done_or_refused(file, content, store):
    path = store.data / file.format(METHOD)
    path.write_text(content)
    try:
        steps.compare(store)
    except InputError as error:
        assert str(path) in str(error)


def test_a_comparison_of_scores_that_were_made_again_is_stale(store):
    path = store.scores(METHOD, "rex") / MANIFEST
    manifest = read_json(path)
    write_json(path, manifest | {"stamp": "0" * 16})
    assert any(
        "the scores of rex by dreambooth have been made again" in words for words in problems(store, "data/comparison")
    )


# The command that makes it again


def test_the_command_that_is_named_makes_the_same_bytes_again(store, monkeypatch):
    monkeypatch.chdir(store.root)
    for what in ("grid", "latents"):
        link = named(steps.explain(store, store.root / IMAGE), what)
        folder = store.root / link.path
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        remove, _, make = link.again.partition(" && ")
        assert shlex.split(remove) == ["rm", "-r", link.path]
        shutil.rmtree(folder)
        done = CliRunner().invoke(app, shlex.split(make)[1:])
        assert done.exit_code == 0, done.output
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", [METHOD, "base_model"])  # one says "<rex> dog" in its prompts, the other "dog"
def test_the_command_that_asked_for_images_asks_for_the_same_again(store, method):
    prompts = ["a photo of a <rex>", "<rex>'s photo", "a photo of a <rex>"]
    made = [
        steps.sample_prompts(store, "rex", method, prompts, images=2),
        steps.heat_maps(store, "rex", method, "<rex>"),
        steps.heat_maps(store, "rex", method, "a <rex>", nouns=["red mug", "dog"]),
    ]
    for report in made:
        link = steps.explain(store, report.path)
        assert link.all_problems() == [] and named(link, "artifact").path == f"data/artifacts/{method}/rex"
        shutil.rmtree(report.path)
        command = shlex.split(link.again.partition(" && ")[2])[1:]
        done = CliRunner().invoke(app, ["--root", str(store.root), *command])
        assert done.exit_code == 0 and report.path.is_dir(), done.output


def test_the_command_that_asked_for_a_way_between_two_concepts_asks_for_the_same_again(store):
    tiny_workspace.paint_concept_images(store.root / "more" / "cup", count=2, seed=1)
    concept_files.add_concept(store.concepts, store.root / "more" / "cup", "red mug")
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    store = tiny_workspace.write_params(store.root, values)
    steps.train(store, "cup", "textual_inversion")
    steps.train(store, "rex", "textual_inversion")
    cells = ("rex", "textual_inversion"), ("cup", "textual_inversion")
    report = steps.sample_between(store, cells, ["a <rex>"], points=4, images=1)
    link = steps.explain(store, report.path)
    assert link.all_problems() == [] and [each.what for each in link.inputs] == ["artifact", "artifact"]
    shutil.rmtree(report.path)
    command = shlex.split(link.again.partition(" && ")[2])[1:]
    done = CliRunner().invoke(app, ["--root", str(store.root), *command])
    assert done.exit_code == 0 and report.path.is_dir(), done.output


# Numbers


def test_a_number_is_explained_by_its_row_and_its_image(store):
    table = tables.read(store.scores(METHOD, "rex") / SCORES)
    row = table.filter(metric="dino", prompt_index=1, image_index=0).row(0, named=True)
    link = steps.explain(store, None, Rows("rex", METHOD, prompt=1, image=0, metric="dino"))
    (found,) = link.facts["scores"]
    assert found["mean"] == row["score"] and found["encoder_sha256"] == row["encoder_sha256"]
    assert link.inputs[0].what == "image" and link.inputs[0].facts["sha256"] == row["image_sha256"]
    assert link.inputs[1].what == "scores" and link.all_problems() == []


def test_a_mean_of_the_comparison_is_explained_by_what_it_is_the_mean_of(store):
    link = steps.explain(store, store.comparison(), Rows(method=METHOD, metric="clip_i"))
    (found,) = link.facts["scores"]
    rows = parquet.read_parquet(store.comparison() / SCORES).filter(method=METHOD, metric="clip_i")
    assert found["images"] == len(rows) == 4 and found["mean"] == pytest.approx(rows["score"].mean())
    assert [each.what for each in link.inputs] == ["scores", "comparison"]


def test_a_image_that_was_sampled_again_since_it_was_scored_is_said_to_be_another(store):
    Image.new("RGB", (16, 16)).save(store.root / IMAGE)
    link = steps.explain(store, None, Rows("rex", METHOD, prompt=0, image=1, metric="dino"))
    assert any("another image now than the one that was scored" in words for words in link.problems)


@pytest.mark.parametrize(
    ("path", "rows", "said"),
    [
        ("data/nothing", Rows(), "there is no"),
        ("params.yaml", Rows(), "is not in"),
        ("data/prompts/two.txt", Rows(), "put there by hand"),
        ("data/grids", Rows(), "several results"),
        (None, Rows(), "name a file or folder"),
        (None, Rows("rex", "oft"), "nothing has been made of 'rex' by oft; run `personalize run rex -m oft`"),
        ("data/comparison", Rows(metric="beauty"), "no such row"),
        ("data/comparison/summary.json", Rows(metric="dino"), "no table of scores"),
        ("data/costs/costs.parquet", Rows(metric="dino"), "holds no scores"),
        (f"data/grids/{METHOD}/rex", Rows(prompt=0), "holds no scores"),
        (f"data/metrics/{METHOD}/rex", Rows(method="oft"), "no such row"),
        ("data/class_images/dog.latents", Rows(), "several results"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_a_sentence(store, path, rows, said):
    with pytest.raises(InputError, match=said):
        steps.explain(store, store.root / path if path else None, rows)


# On the command line


def test_the_command_shows_the_chain_and_what_is_wrong_with_it(store):
    run = CliRunner().invoke
    shown = run(app, ["--root", str(store.root), "explain", str(store.root / IMAGE)]).output
    assert "All of it is unchanged and up to date" in shown and "dreambooth" in shown
    (store.root / IMAGE).unlink()
    shown = run(app, ["--root", str(store.root), "explain", str(store.grid(METHOD, "rex"))]).output
    assert "! grid data/grids/dreambooth/rex: dreambooth/00_01.png is gone" in shown


def test_as_json_every_hash_is_whole(store):
    said = CliRunner().invoke(app, ["--root", str(store.root), "explain", IMAGE, "--json"]).output
    found = json.loads(said)
    assert found["facts"]["sha256"] == sha256(store.root / IMAGE)
    assert found["inputs"][0]["what"] == "grid" and found["inputs"][0]["again"].startswith("rm -r data/grids")
