"""Concept images that are held out: no training reads them, and the headline of identity is taken against them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scipy import stats

from personalize_core import steps
from personalize_core.analyses import copying
from personalize_core.analyses.findings import Findings
from personalize_core.analyses.inputs import Grid, ImageInputs
from personalize_core.concepts import concept_files, image_check, image_files
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import METHOD_NAMES, recipe_class
from personalize_core.metrics import features, held_out, summaries, tables
from personalize_core.steps import input_checks
from personalize_core.steps.latents import images_encoded, read_latents
from personalize_core.steps.planning import plan
from personalize_core.workspace.recipes import load_base, preprocessing_of, split_of
from personalize_core.workspace.stamps.latents import latents_stamp
from personalize_core.workspace.stamps.scoring import score_stamp, scoring_stamp
from personalize_core.workspace.stamps.training import recipe_stamp
from personalize_core.workspace.store import REFERENCES, SCORES, Store
from tests import tiny_workspace
from tests.conftest import tiny_base
from tests.tiny_adapter import write_adapter

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

SCORED = ["base_model", "textual_inversion"]


def short(method: str) -> dict[str, Any]:
    """A recipe of one step."""
    config: Any = recipe_class(method)
    names = [field.name for field in dataclasses.fields(config)]
    found: dict[str, Any] = {name: 1 for name in names if name.endswith("steps")}
    found |= {name: 2 for name in names if name.endswith("batch_size")}
    return found | ({"class_images": 2} if config().class_images_needed else {})


def params(root: Path, methods: list[str], wanted: int | float) -> dict:
    values = tiny_workspace.params(root)
    values["methods"] = {name: {values["base_model"]: short(name)} for name in methods}
    if "ip_adapter" in methods:
        adapter = write_adapter(root / "adapter", tiny_base())
        values["methods"]["ip_adapter"][values["base_model"]]["adapter"] = str(adapter)
    return values | {"variants": {}, "held_out": wanted}


def make(root: Path) -> Store:
    """rex has seven images, of which two are held out; cup has three."""
    store = tiny_workspace.make(root)
    shutil.rmtree(store.concept_folder("rex"))
    tiny_workspace.paint_concept_images(root / "more" / "rex", count=7, seed=9)
    concept_files.add_concept(store.concepts, root / "more" / "rex", "dog")
    return tiny_workspace.write_params(root, params(root, SCORED, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make(tmp_path_factory.mktemp("held_out"))
    for concept in ("rex", "cup"):
        for method in SCORED:
            for step in (steps.train, steps.sample_grid, steps.score):
                step(store, concept, method)
        steps.score_references(store, concept)
    steps.compare(store)
    return store.root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished, tmp_path)


def repaint(path: Path) -> None:
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC).save(path)


def table_of(store: Store, method: str, concept: str) -> pl.DataFrame:
    return tables.read(store.scores(method, concept) / SCORES)


# Training


def test_no_method_reads_an_image_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of every file that is decoded while all methods are trained, and of every image that is checked before."""
    store = make(tmp_path)
    store = tiny_workspace.write_params(tmp_path, params(tmp_path, list(METHOD_NAMES), 2))
    split, folder, read = split_of(store, "rex"), store.concept_folder("rex"), set()
    assert len(split.held_out) == 2
    plain, check = image_files.read_bytes, image_check.check_images
    monkeypatch.setattr(image_files, "read_bytes", lambda path, most: read.add(path) or plain(path, most))
    monkeypatch.setattr(image_check, "check_images", lambda paths: read.update(paths) or check(paths))
    for method in METHOD_NAMES:
        assert not steps.train(store, "rex", method).skipped
        latents = store.latents("rex", preprocessing_of(store, method).key)
        assert images_encoded(latents) == len(read_latents(store, "rex", method, None)) == len(split.trained_on)
    assert {path.name for path in read if path.parent == folder} == set(split.trained_on)

    for name in split.held_out:
        repaint(folder / name)
    assert all(steps.train(store, "rex", method).skipped for method in METHOD_NAMES)
    repaint(folder / split.trained_on[0])
    assert not any(steps.train(store, "rex", method).skipped for method in METHOD_NAMES)


def test_the_latents_are_those_of_the_images_trained_on(store: Store):
    from personalize_core.concepts.images import to_pixels, views_of

    base, recipe = load_base(store), preprocessing_of(store, "textual_inversion")
    latents = read_latents(store, "rex", "textual_inversion", None)
    for moments, name in zip(latents.concept, split_of(store, "rex").trained_on, strict=True):
        image = image_files.load_image(store.concept_folder("rex") / name)
        assert (base.moments(to_pixels(views_of(recipe, image, base.image_size))) == moments).all()


def test_without_the_setting_stamps_know_nothing_of_it(store: Store):
    root = Path(store.params.base_model).parents[1]
    values = params(root, SCORED, 0)
    unset = tiny_workspace.write_params(store.root, {name: values[name] for name in values if name != "held_out"})
    stamps = [score_stamp(unset, "rex", name) for name in ("textual_inversion", REFERENCES)]
    stamps += [recipe_stamp(unset, "textual_inversion"), scoring_stamp(unset)]
    assert not any("held_out" in stamp.of for stamp in stamps)
    latents = latents_stamp(unset, "rex", preprocessing_of(unset, "textual_inversion"))
    assert latents.of["files"] == concept_files.content(unset.concept_folder("rex"))
    with_zero = tiny_workspace.write_params(store.root, values)
    assert [score_stamp(with_zero, "rex", name) for name in ("textual_inversion", REFERENCES)] == stamps[:2]


def test_a_changed_held_out_image_is_scored_anew_and_nothing_is_trained(store: Store):
    before = table_of(store, "textual_inversion", "rex")
    repaint(store.concept_folder("rex") / split_of(store, "rex").held_out[0])
    (cell,) = plan(store, ["rex"], ["textual_inversion"])
    assert cell.first == "score"
    assert steps.sample_grid(store, "rex", "textual_inversion").skipped
    assert not steps.score(store, "rex", "textual_inversion").skipped
    both = before.join(table_of(store, "textual_inversion", "rex"), on=["metric", "encoder", "image"])
    moved = {m for (m,), own in both.group_by("metric") if (own["score"] != own["score_right"]).any()}
    assert moved == {"dino", "clip_i"}


def test_holding_out_later_trains_again_and_says_why(store: Store):
    root = Path(store.params.base_model).parents[1]
    more = tiny_workspace.write_params(store.root, params(root, SCORED, 3))
    (added,) = set(split_of(more, "rex").held_out) - set(split_of(store, "rex").held_out)
    (cell,) = plan(more, ["rex"], ["textual_inversion"])
    assert (cell.first, cell.why) == ("train", f"concept images changed: removed {added}")
    assert plan(more, ["cup"], SCORED) == []  # of three images, none is held out


def test_a_grid_whose_artifact_was_trained_on_an_image_held_out_now_is_not_scored(store: Store):
    root = Path(store.params.base_model).parents[1]
    more = tiny_workspace.write_params(store.root, params(root, SCORED, 3))
    with pytest.raises(InputError, match="textual_inversion was trained on .* of 'rex', which params.yaml holds out"):
        steps.score(more, "rex", "textual_inversion")


def test_an_image_that_is_there_twice_is_refused_before_anything_is_trained(store: Store):
    split, folder = split_of(store, "rex"), store.concept_folder("rex")
    shutil.copy(folder / split.trained_on[0], folder / split.held_out[0])
    with pytest.raises(InputError, match="are the same image, and one of them would be held out"):
        input_checks.check_inputs(store, ["rex"], ["textual_inversion"])


def test_a_method_that_takes_more_images_than_are_trained_on_is_refused(store: Store):
    root = Path(store.params.base_model).parents[1]
    values = params(root, ["vico"], 4) | {"variants": {"vico": {"vico": {"reference": 3}}}}
    few = tiny_workspace.write_params(store.root, values)
    with pytest.raises(InputError, match="it takes 4 concept images, and 'rex' has 3 that are not held out"):
        input_checks.check_inputs(few, ["rex"], ["vico"])


# Scores


@pytest.fixture(scope="module")
def seen(finished: Path):
    """(encoder's metric, files) -> features, rows of length one, as numpy has them."""
    store = Store(finished)
    encoders = features.load_encoders(**store.params.encoders.model_dump(), device="cpu")

    def of(metric: str, paths: list[Path]) -> np.ndarray:
        encoder = {"clip_i": encoders.text_image, "dino": encoders.identity}[metric][0]
        rows = encoder.images([image_files.load_image(path) for path in paths]).double().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return of


@pytest.mark.parametrize("metric", ["dino", "clip_i"])
def test_scores_are_the_mean_cosines_with_either_set(metric: str, finished: Path, seen):
    store = Store(finished)
    split, folder = split_of(store, "rex"), store.concept_folder("rex")
    table = table_of(store, "textual_inversion", "rex")
    for name, files, references in (
        (metric, split.held_out, tables.HELD_OUT),
        (f"{metric}_trained_on", split.trained_on, tables.TRAINED_ON),
    ):
        rows = table.filter(metric=name)
        images = seen(metric, [store.root / path for path in rows["image"]])
        expected = [np.mean([image @ other for other in seen(metric, [folder / f for f in files])]) for image in images]
        assert rows["score"].to_list() == pytest.approx(expected, abs=1e-6)
        assert set(rows["references"]) == {references} and set(rows["pairs"]) == {len(files)}
    assert table.filter(metric="clip_t")["references"].null_count() == len(table.filter(metric="clip_t"))


@pytest.mark.parametrize("metric", ["dino", "clip_i"])
def test_the_ceiling_is_held_out_against_trained_on(metric: str, finished: Path, seen):
    store = Store(finished)
    split, folder = split_of(store, "rex"), store.concept_folder("rex")
    cosines = (
        seen(metric, [folder / f for f in split.trained_on]) @ seen(metric, [folder / f for f in split.held_out]).T
    )
    table = table_of(store, REFERENCES, "rex").filter(pl.col("metric").str.starts_with(metric))
    scores = {(row["metric"], Path(row["image"]).name): row["score"] for row in table.iter_rows(named=True)}
    expected = dict(zip([(metric, name) for name in split.trained_on], cosines.mean(axis=1), strict=True))
    expected |= zip([(f"{metric}_trained_on", name) for name in split.held_out], cosines.mean(axis=0), strict=True)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert set(table["pairing"]) == {tables.ALL_PAIRS}
    # the interval of one concept: the jackknife over either set of images, leaving each out in turn
    summary = summaries.summarise(table_of(store, REFERENCES, "rex"), draws=100).filter(concept="rex", metric=metric)
    parts = []
    for axis, count in enumerate(cosines.shape):
        without = np.array([np.delete(cosines, k, axis).mean() for k in range(count)])
        parts.append((count - 1) / count * ((without - without.mean()) ** 2).sum())
    assert summary["error"].item() == pytest.approx(np.sqrt(sum(parts)), rel=1e-6)
    assert summary["mean"].item() == pytest.approx(cosines.mean(), abs=1e-6)


def test_of_few_images_all_are_trained_on_and_the_headline_is_absent_with_its_reason(finished: Path):
    store = Store(finished)
    table = table_of(store, "textual_inversion", "cup")
    assert {"dino_trained_on", "clip_i_trained_on"} < set(table["metric"])
    assert not {"dino", "clip_i"} & set(table["metric"])
    absent = (store.scores("textual_inversion", "cup") / "absent.json").read_text()
    assert "of 3 concept images none is held out, and all are trained on" in absent
    assert set(table_of(store, REFERENCES, "cup")["pairing"]) == {tables.OTHER_REAL}
    for method in (*SCORED, REFERENCES):
        assert all(gate.passed for gate in steps.result_checks.scores(store, "cup", method))
        assert all(gate.passed for gate in steps.result_checks.scores(store, "rex", method))


def test_scores_with_images_held_out_never_join_those_with_all(store: Store):
    root = Path(store.params.base_model).parents[1]
    held = table_of(store, "textual_inversion", "rex")
    everything = tiny_workspace.write_params(store.root, params(root, SCORED, 0))
    steps.score(everything, "rex", "base_model")
    plain = table_of(everything, "base_model", "rex")
    assert set(plain.filter(metric="dino")["references"]) == {tables.ALL_IMAGES}
    with pytest.raises(InputError, match="references '(held out|all concept images)' and"):
        tables.concatenate([held, plain])


def test_an_earlier_table_is_refused_with_a_sentence(store: Store):
    earlier = table_of(store, "textual_inversion", "rex").drop("references")
    with pytest.raises(InputError, match="has no column 'references'; score the images again"):
        tables.checked(earlier)


def test_what_copying_adds_is_the_mean_of_the_differences_image_by_image(finished: Path):
    store = Store(finished)
    found = held_out.what_copying_adds(tables.read(store.comparison() / SCORES), draws=200)
    assert set(found["concept"]) == {"rex", tables.ALL_CONCEPTS}
    both = {}
    for variant in SCORED:
        table = table_of(store, variant, "rex")
        scores = [
            {row["image"]: (row["prompt_index"], row["score"]) for row in table.filter(metric=name).to_dicts()}
            for name in ("dino", "dino_trained_on")
        ]
        by_prompt: dict[int, list[float]] = {}
        for image, (prompt, score) in scores[0].items():
            by_prompt.setdefault(prompt, []).append(scores[1][image][1] - score)
        both[variant] = np.array([np.mean(values) for values in by_prompt.values()])
        row = found.filter(concept="rex", variant=variant, metric="dino").row(0, named=True)
        means = both[variant]
        assert row["difference"] == pytest.approx(means.mean(), abs=1e-12)
        assert row["difference"] == pytest.approx(row["trained_on"] - row["held_out"], abs=1e-12)
        error = means.std(ddof=1) / np.sqrt(len(means))
        assert row["error"] == pytest.approx(error, rel=1e-9)
        assert row["high"] - row["low"] == pytest.approx(2 * stats.t.ppf(0.975, len(means) - 1) * error, rel=1e-9)
    beyond = found.filter(concept="rex", metric="dino", variant="textual_inversion")["beyond"].item()
    assert beyond == pytest.approx((both["textual_inversion"] - both["base_model"]).mean(), abs=1e-12)
    assert found.filter(variant="base_model")["beyond"].null_count() == len(found.filter(variant="base_model"))


# Copying


class Fixed:
    """An encoder whose features are the mean colours."""

    name = "colours"


def test_copying_is_looked_for_among_the_images_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = {}
    for name, colour in {
        "trained": (200, 0, 0),
        "other": (0, 200, 0),
        "held": (0, 0, 200),
        "made": (10, 0, 200),
    }.items():
        pixels = np.random.default_rng(len(paths)).integers(0, 40, (32, 32, 3)) + np.array(colour)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
        paths[name] = tmp_path / f"{name}.png"

    def colours(self: ImageInputs, encoder: Any, files: list[Path]) -> np.ndarray:
        rows = np.stack([np.asarray(Image.open(path), dtype=float).mean(axis=(0, 1)) for path in files])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(ImageInputs, "features", colours)
    encoder: Any = Fixed()
    grid = Grid(tmp_path, ["a photo of a {}"], [(0, 0)], {"vico": ["made.png"]})
    inputs = ImageInputs(
        method="vico",
        concept=Concept("rex", "<rex>", "dog"),
        identity=encoder,
        text_image=encoder,
        concept_images=[paths["trained"], paths["other"]],
        grid=grid,
        baseline=None,
        scores=None,
        baseline_scores=None,
        held_out=[paths["held"]],
    )
    folder = tmp_path / "found"
    folder.mkdir()
    findings = Findings(folder, copying.TITLE, copying.HOW)
    copying.analyse(inputs, findings)
    rows = pl.read_parquet(folder / "copying.parquet")
    assert set(rows["nearest"]) <= {"trained.png", "other.png"}  # though the held-out image is much nearer
    assert set(rows.filter(variant="held out")["image"]) == {"held.png"}
