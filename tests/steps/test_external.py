"""Images made elsewhere: from a folder of another program to a column of the comparison, and what can go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from personalize_core import steps
from personalize_core.cli.external import score_registered
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.metrics import tables
from personalize_core.metrics.encoder_names import MINI_WEIGHTS
from personalize_core.report import comparison
from personalize_core.steps import result_checks
from personalize_core.workspace.external_columns import ExternalColumn, registered
from personalize_core.workspace.store import ABSENT, SCORES, Store
from tests import recomputed_scores
from tests.report import workspace
from tests.steps.interrupted_column import STOP_AT

PROMPTS = [template.replace("{}", "sks dog") for template in workspace.PROMPTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Store:
    """Two concepts, three methods; scores that nobody measured."""
    return workspace.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def store(made, tmp_path) -> Store:
    shutil.copytree(made.root, tmp_path / "workspace")
    return Store(tmp_path / "workspace")


def folder_of(place: Path, prompts=PROMPTS, images=2, seeds=True, name="image") -> Path:
    """What another program might have made: JPEGs and PNGs of several sizes, and a manifest."""
    place.mkdir(parents=True)
    rows = []
    for prompt, words in enumerate(prompts):
        for image in range(images):
            file = f"{name}_{prompt}_{image}.{'jpg' if image else 'png'}"
            workspace.noise_image([7, prompt, image], (40 + 8 * image, 30)).save(place / file)
            rows.append({"file": file, "prompt": words} | ({"seed": 100 + image} if seeds else {}))
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def add(store: Store, folder: Path, label="flux", concept="rex", **options) -> steps.Report:
    steps.add_external(store, label, concept, ExternalColumn(folder=str(folder), **options))
    return steps.score_external(store, concept, label)


def scores_of(store: Store, label="flux", concept="rex") -> pl.DataFrame:
    return tables.read(store.scores(label, concept) / SCORES)


def test_a_folder_becomes_a_column_and_is_only_read(store, tmp_path):
    folder = folder_of(tmp_path / "out")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    report = add(store, folder, source="FLUX.1-dev")
    assert not report.skipped and before == {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
    }
    assert report.images["grid"].is_file()
    table = scores_of(store)
    assert set(table["source"]) == {"FLUX.1-dev"} and set(table["seed"]) == {100, 101}
    assert set(table["prompt"]) == set(workspace.PROMPTS)
    assert table.filter(metric="dino").height == 8
    assert steps.score_external(store, "rex", "flux").skipped
    assert registered(store) == [("flux", "rex")]


def test_a_column_whose_scoring_was_killed_goes_on_and_leaves_the_same_bytes(store, tmp_path):
    folder = folder_of(tmp_path / "out", images=40)
    steps.add_external(store, "flux", "rex", ExternalColumn(folder=str(folder)))
    undisturbed = Store(shutil.copytree(store.root, tmp_path / "undisturbed"))
    command = [sys.executable, "-m", "tests.steps.interrupted_column", str(store.root), "rex", "flux"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout
        reached = next(done for line in process.stdout if (done := int(line)) >= STOP_AT)
        process.kill()
    kept = store.work("features", *store.scores("flux", "rex").relative_to(store.data).parts)
    assert reached < 160 and list(kept.iterdir()) and not store.scores("flux", "rex").exists()

    steps.score_external(store, "rex", "flux")
    steps.score_external(undisturbed, "rex", "flux")
    assert not kept.exists()
    for name in (SCORES, ABSENT):
        assert (store.scores("flux", "rex") / name).read_bytes() == (
            undisturbed.scores("flux", "rex") / name
        ).read_bytes()


def test_every_number_is_found_again_by_other_means(store, tmp_path):
    """As tests/metrics/test_scores_recomputed.py does for ours: by a script that shares no code with the project."""
    add(store, folder_of(tmp_path / "out"))
    table, bicubic = scores_of(store), Image.Resampling.BICUBIC
    half = (0.5, 0.5)
    text = recomputed_scores.OfText(MINI_WEIGHTS / "clip", (64, bicubic, *half))
    identity = recomputed_scores.OfIdentity(MINI_WEIGHTS / "identity", (64, bicubic, *half))
    references = [Image.open(path).convert("RGB") for path in sorted((store.concepts / "rex").glob("*.png"))]
    found = {(row["metric"], row["image"]): row["score"] for row in table.iter_rows(named=True)}
    for row in table.filter(metric="clip_t").iter_rows(named=True):
        image = Image.open(row["image"]).convert("RGB")
        words = row["prompt"].replace("{}", "dog")
        with torch.inference_mode():
            expected = {
                "clip_t": float(text.see(image) @ text.say(words)),
                "clip_i": float(np.mean([text.see(image) @ text.see(one) for one in references])),
                "dino": float(np.mean([identity.see(image) @ identity.see(one) for one in references])),
            }
        for metric, value in expected.items():
            assert found[metric, row["image"]] == pytest.approx(value, abs=1e-5)


def test_its_images_are_analysed_as_far_as_images_alone_allow(store, tmp_path):
    """Prompts with three images, two and one; copying and diversity recomputed pair by pair from the files."""
    folder = folder_of(tmp_path / "out", PROMPTS[:3], images=3)
    manifest = folder / "prompts.jsonl"
    manifest.write_text(
        "\n".join(manifest.read_text().splitlines()[:6]) + "\n" + '{"file": "c.png", "prompt": "a dog"}'
    )
    concept_images = sorted((store.concepts / "rex").glob("*.png"))
    shutil.copy(concept_images[1], folder / "c.png")
    steps.add_external(store, "flux", "rex", ExternalColumn(folder=str(folder)))
    with pytest.raises(InputError, match="'flux' of 'rex' have not been scored; run `personalize score`"):
        steps.analyse(store, "rex", "flux")
    steps.score_external(store, "rex", "flux")
    report = steps.analyse(store, "rex", "flux")
    found = json.loads((report.path / steps.ANALYSES).read_text())
    assert found["order"] == ["per_prompt", "per_kind", "absence", "copying", "diversity"]
    assert steps.analyse(store, "rex", "flux").skipped

    identity = recomputed_scores.OfIdentity(MINI_WEIGHTS / "identity", (64, Image.Resampling.BICUBIC, 0.5, 0.5))

    def see(path: Path) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(identity.see(Image.open(path).convert("RGB")), dtype=np.float64)

    real = {path.name: see(path) for path in concept_images}
    copies = pl.read_parquet(report.path / "copying.parquet").filter(encoder="mini-identity", variant="flux")
    assert copies.height == 7
    for row in copies.iter_rows(named=True):
        alike = {name: float(see(folder / row["image"]) @ one) for name, one in real.items()}
        assert row["nearest"] == max(alike, key=lambda name: alike[name])
        assert row["similarity"] == pytest.approx(max(alike.values()), abs=1e-5)
    pixels = pl.read_parquet(report.path / "copying.parquet").filter(encoder="pixels", image="c.png").row(0, named=True)
    assert pixels["similarity"] == pytest.approx(1, abs=1e-9) and pixels["nearest"] == concept_images[1].name
    diverse = pl.read_parquet(report.path / "diversity.parquet").filter(encoder="mini-identity", variant="flux")
    assert diverse["images"].to_list() == [3, 3]
    for prompt, row in enumerate(diverse.iter_rows(named=True)):
        own = [see(path) for path in sorted(folder.glob(f"image_{prompt}_*"))]
        apart = [1 - float(one @ other) for number, one in enumerate(own) for other in own[:number]]
        assert row["distance"] == pytest.approx(np.mean(apart), abs=1e-5)
    assert "1 prompts have one image each" in found["analyses"]["diversity"]["absent"]["prompts"]

    workspace.noise_image([1, 1], (20, 20)).save(folder / "c.png")
    shutil.rmtree(report.path)
    with pytest.raises(InputError, match="c.png has changed since it was scored.*`personalize score`"):
        steps.analyse(store, "rex", "flux")


def test_it_stands_in_the_comparison_the_report_and_every_table(store, tmp_path):
    folder = tmp_path / "out"
    add(store, folder_of(folder))
    add(store, folder_of(tmp_path / "other", [f"my dog, scene {n}" for n in range(5)]), label="unpaired")
    rescored(store)
    steps.compare(store)
    pairs = pl.read_parquet(store.comparison() / "pairs.parquet").filter(metric="dino")
    ways = {(row["variant"], row["other"]): row["pairing"] for row in pairs.iter_rows(named=True)}
    assert ways["base_model", "flux"] == "prompt"
    assert ways["flux", "unpaired"] == ways["base_model", "unpaired"] == "unpaired"
    assert ways["base_model", "dreambooth"] == "prompt and noise"
    steps.analyse(store, "rex", "flux")
    page = steps.report(store).path.read_text()
    assert "Images made elsewhere" in page and "flux: the images nearest to a training concept image" in page
    assert page.count("flux") > 5 and "scene 4" in page
    columns = pl.read_parquet(store.report() / "tables" / "over_the_baseline.parquet")
    assert set(columns.filter(variant="flux")["pairing"]) == {"prompt"}


def test_the_grid_of_a_column_with_many_prompts_shows_the_first_and_stays_legible(store, tmp_path):
    sizes = []
    for count in (comparison.MOST_SHOWN[0], 75):
        folder = folder_of(tmp_path / str(count), [f"my dog, scene {n:03d}" for n in range(count)], images=1)
        steps.add_external(store, f"of-{count}", "rex", ExternalColumn(folder=str(folder)))
        steps.list_external(store, "rex", f"of-{count}")
        comparison._compare_grids(store, "rex", [store.grid(f"of-{count}", "rex")], path := tmp_path / f"{count}.png")
        with Image.open(path) as grid:
            sizes.append(grid.size)
    assert sizes[0][0] == sizes[1][0] < 12_000


def test_a_folder_can_be_the_baseline(store, tmp_path):
    add(store, folder_of(tmp_path / "out"))
    rescored(store)
    params = store.root / "params.yaml"
    params.write_text(params.read_text() + "baseline: flux\n")
    store = Store(store.root)
    steps.compare(store)
    found = pl.read_parquet(store.comparison() / "differences.parquet")
    assert "flux" not in set(found["variant"]) and "base_model" in set(found["variant"])
    page = steps.report(store).path.read_text()
    assert "Compared with the baseline, flux" in page and "which learned nothing" not in page


def test_a_baseline_that_nobody_scored_is_refused_with_those_there_are(store):
    params = store.root / "params.yaml"
    params.write_text(params.read_text() + "baseline: fluks\n")
    with pytest.raises(InputError, match="baseline 'fluks' has no scores.* of base_model, dreambooth and textual_inv"):
        steps.compare(Store(store.root))
    assert not store.comparison().exists()


def rescored(store: Store) -> None:
    """The methods' own grids by the same encoders as the external columns, in place of scores that nobody measured."""
    for concept in workspace.CONCEPTS:
        for method in workspace.LEVELS:
            steps.score(store, concept, method)
        steps.score_references(store, concept)


def test_an_image_whose_prompt_does_not_name_the_concept_is_left_out_with_the_reason(store, tmp_path):
    add(store, folder_of(tmp_path / "out", [*PROMPTS[:2], "a cat"]))
    assert set(scores_of(store)["prompt"]) == set(workspace.PROMPTS[:2])
    absent = read_json(store.scores("flux", "rex") / ABSENT)
    assert [one["image"] for one in absent if "does not mention" in one["reason"]] == ["image_2_0.png", "image_2_1.jpg"]


def test_prompts_that_never_name_the_concept_are_refused_with_what_to_do(store, tmp_path):
    folder = folder_of(tmp_path / "out", ["photo of ohwx pet in the snow", "ohwx pet asleep"])
    with pytest.raises(InputError, match="--mention"):
        add(store, folder)
    assert registered(store) == [] and not store.scores("flux", "rex").exists()
    add(store, folder, mention="ohwx pet")
    assert set(scores_of(store)["text"].drop_nulls()) >= {"photo of dog in the snow", "dog asleep"}


def test_a_prompt_with_a_tokenizers_mark_is_refused_with_its_image(store, tmp_path):
    folder = folder_of(tmp_path / "out", [*PROMPTS[:2], "a sks dog <|endoftext|> in the snow"])
    with pytest.raises(InputError, match=r"image_2_0.png: '<\|endoftext\|>' is no word"):
        add(store, folder)
    assert registered(store) == []


@pytest.mark.parametrize("label", ["dreambooth", "real_images", "Flux", "a/b", "vico@x", "", "x" * 64])
def test_a_label_that_cannot_be_one_is_refused(store, tmp_path, label):
    with pytest.raises(InputError, match="label"):
        add(store, folder_of(tmp_path / "out"), label=label)
    assert registered(store) == []


def test_a_label_does_not_change_its_folder_unasked(store, tmp_path):
    add(store, folder_of(tmp_path / "one"))
    with pytest.raises(InputError, match="stands for .*one already"):
        add(store, folder_of(tmp_path / "two"))
    add(store, tmp_path / "one", source="now known")
    assert set(scores_of(store)["source"]) == {"now known"}


def test_a_changed_image_is_scored_again_and_a_missing_one_is_named(store, tmp_path):
    folder = folder_of(tmp_path / "out")
    add(store, folder)
    before = scores_of(store)
    workspace.noise_image([99], (40, 30)).save(folder / "image_0_0.png")
    assert not steps.score_external(store, "rex", "flux").skipped
    assert not scores_of(store).equals(before)
    (folder / "image_1_0.png").unlink()
    with pytest.raises(InputError, match="image_1_0.png"):
        steps.score_external(store, "rex", "flux")


def test_a_column_of_another_concept_is_not_of_this_one(store, tmp_path):
    add(store, folder_of(tmp_path / "out"))
    with pytest.raises(InputError, match="there is no external column 'flux' of 'cup'"):
        steps.score_external(store, "cup", "flux")


def test_an_image_that_cannot_be_read_is_absent_with_its_reason_and_the_others_are_scored(store, tmp_path):
    folder = folder_of(tmp_path / "out")
    whole = add(store, folder_of(tmp_path / "whole"), label="whole") and scores_of(store, "whole")
    (folder / "image_1_0.png").write_bytes((folder / "image_1_0.png").read_bytes()[:60])
    (folder / "image_2_1.jpg").write_bytes(b"")
    (folder / "unnamed.png").write_bytes((folder / "image_1_1.jpg").read_bytes())
    first = add(store, folder)
    again = steps.score_external(store, "rex", "flux")
    assert again.skipped and first.notices == again.notices
    named = [
        f"left out: {folder}/image_1_0.png cannot be read as an image",
        f"left out: {folder}/image_2_1.jpg is empty",
        "left out: unnamed.png is not named in prompts.jsonl",
    ]
    assert all(line.startswith(words) for line, words in zip(first.notices, named, strict=True))
    (complete,) = [gate for gate in result_checks.scores(store, "rex", "flux") if gate.name == "scores_complete"]
    assert complete.passed and "but for those left out:" in complete.said and "image_2_1.jpg is empty" in complete.said
    table = scores_of(store)
    assert table.filter(metric="dino").height == 6
    names = pl.col("image").str.split("/").list.last().alias("file")
    both = table.select("metric", names, "score").join(whole.select("metric", names, "score"), on=["metric", "file"])
    assert len(both) == len(table) and (both["score"] - both["score_right"]).abs().max() < 1e-6  # type: ignore[operator]
    absent = read_json(store.scores("flux", "rex") / ABSENT)
    assert sorted(Path(one["image"]).name for one in absent) == ["image_1_0.png", "image_2_1.jpg", "unnamed.png"]
    assert all(one["reason"] for one in absent)
    rescored(store)
    steps.compare(store)
    assert "flux" in steps.report(store).path.read_text()


def test_the_command_names_the_first_of_many_images_that_are_left_out_and_where_the_others_are(store, tmp_path, capsys):
    folder = folder_of(tmp_path / "out")
    for number in range(9):
        workspace.noise_image([number], (20, 20)).save(folder / f"unnamed_{number}.png")
    *named, more = add(store, folder).notices
    assert [line.split()[2] for line in named] == [f"unnamed_{number}.png" for number in range(6)]
    assert more == f"left out: 3 more, which {store.scores('flux', 'rex') / ABSENT} names"
    capsys.readouterr()
    score_registered(store)
    printed = capsys.readouterr().out
    assert all(line in printed for line in [*named, more])


def test_a_folder_of_images_none_of_which_can_be_read_is_refused(store, tmp_path):
    folder = folder_of(tmp_path / "out", PROMPTS[:1])
    for path in folder.glob("image*"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 2 images can be read"):
        add(store, folder)
    assert not store.scores("flux", "rex").exists()


def test_the_chain_behind_its_numbers_ends_at_the_images_and_tells_a_changed_one(store, tmp_path):
    folder = folder_of(tmp_path / "out")
    report = add(store, folder, source="FLUX.1-dev")
    link = steps.explain(store, report.path)
    (scores,) = link.inputs if link.what == "file" else (link,)
    images = scores.inputs[0]
    assert (scores.what, images.what, images.facts["images"]) == ("scores", "external images", 8)
    assert images.facts["external"]["source"] == "FLUX.1-dev" and not images.problems
    assert steps.explain(store, rows=steps.Rows("rex", "flux")).path == scores.path
    workspace.noise_image([99], (40, 30)).save(folder / "image_0_0.png")
    (folder / "image_1_0.png").unlink()
    problems = steps.explain(store, store.grid("flux", "rex")).problems
    assert all(word in " ".join(problems) for word in ("image_0_0.png has been changed", "image_1_0.png is gone"))
    assert len(problems) == 2


def test_a_column_whose_folder_is_gone_is_among_what_is_wrong(store, tmp_path):
    folder = folder_of(tmp_path / "out")
    steps.add_external(store, "flux", "rex", ExternalColumn(folder=str(folder)))
    before = list(map(str, steps.problems_of_workspace(store)))
    shutil.rmtree(folder)
    after = list(map(str, steps.problems_of_workspace(store)))
    (said,) = [one for one in after if one not in before]
    assert said.startswith(f"{folder} does not exist") and "remove that file to leave the column out" in said
    assert str(store.external("flux", "rex")) in said


@pytest.fixture
def compared(store, tmp_path) -> tuple[Store, Path]:
    """A workspace with a column of images that are named PROMPT_SEED.png, and the folder of these."""
    folder = tmp_path / "out"
    folder.mkdir()
    for prompt in range(len(PROMPTS)):
        for seed in range(2):
            workspace.noise_image([7, prompt, seed], (40, 30)).save(folder / f"{prompt}_{seed}.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    add(store, folder)
    rescored(store)
    steps.compare(store)
    return store, folder


def refused_report(store: Store) -> str:
    """As `personalize report`: compare, then report."""
    steps.compare(store)
    with pytest.raises(InputError) as refused:
        steps.report(store)
    return str(refused.value)


def test_a_report_names_every_image_that_is_gone_and_goes_on_with_those_that_are_left(compared):
    store, folder = compared
    kept = {name: (folder / name).read_bytes() for name in ("1_0.png", "3_1.png")}
    for name in kept:
        (folder / name).unlink()
    ours = store.grid("dreambooth", "cup") / "dreambooth" / "00_01.png"
    image = ours.read_bytes()
    ours.unlink()
    said = refused_report(store)
    assert f"of 'rex' by flux were scored and are gone: {folder}/1_0.png and {folder}/3_1.png; put them back" in said
    assert f"are gone: {ours}; run `personalize evaluate cup -m dreambooth`" in said
    ours.write_bytes(image)

    assert "run `personalize score`" in refused_report(store)
    steps.score_external(store, "rex", "flux")
    steps.compare(store)
    assert "flux" in steps.report(store).path.read_text()

    for name, content in kept.items():
        (folder / name).write_bytes(content)
    steps.score_external(store, "rex", "flux")
    (folder / "1_0.png").unlink()
    assert "put them back" in refused_report(store)
    (folder / "1_0.png").write_bytes(kept["1_0.png"])
    assert steps.report(store).path.is_file()


def test_a_report_goes_on_without_a_column_whose_images_are_all_gone_or_others(compared):
    store, folder = compared
    workspace.noise_image([99], (40, 30)).save(folder / "0_0.png")
    assert "0_0.png has changed since it was scored" in (said := refused_report(store)) and "personalize score" in said
    shutil.rmtree(folder)
    described = store.external("flux", "rex")
    assert f"remove {described}" in refused_report(store)
    with pytest.raises(InputError, match=f"out does not exist.* {described} describes this column; .* remove that"):
        steps.score_external(store, "rex", "flux")
    described.unlink()
    steps.compare(store)
    assert "flux" not in steps.report(store).path.read_text()
