"""What is seen of a training that is watched: its images and how good they are, beside the artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from personalize_core import steps
from personalize_core.artifacts.saving import restore
from personalize_core.concepts import concept_files
from personalize_core.concepts.image_files import load_image
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, read_json
from personalize_core.metrics import parquet
from personalize_core.metrics.encoders import load_identity_encoder, load_text_image_encoder
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.steps.probe_record import MEANINGS
from personalize_core.steps.probing import Eye
from personalize_core.steps.training import UNTIL_IT_ENDED
from personalize_core.training.probe_files import ENDED, PROBE_CURVES, PROBE_IMAGES, PROBES
from personalize_core.workspace.recipes import load_base, split_of
from personalize_core.workspace.stamps.training import train_stamp, training_inputs
from personalize_core.workspace.store import Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks")

METHOD = "textual_inversion"


def params(root: Path, recipe: dict | None = None, **changes) -> dict:
    values = tiny_workspace.params_of(root, ["base_model", METHOD])
    values["methods"][METHOD] = {values["base_model"]: {"steps": 60, "batch_size": 2, **(recipe or {})}}
    probes = {"share": 0.5, "prompts": 2, "steps": 1}
    return values | {"probes": probes} | changes


def make(root: Path, recipe: dict | None = None, **changes) -> Store:
    """rex has seven images, of which two may be held out."""
    store = tiny_workspace.make(root)
    shutil.rmtree(store.concept_folder("rex"))
    tiny_workspace.paint_concept_images(root / "more" / "rex", count=7, seed=9)
    concept_files.add_concept(store.concepts, root / "more" / "rex", "dog")
    return tiny_workspace.write_params(root, params(root, recipe, **changes))


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Store:
    store = make(tmp_path_factory.mktemp("watched"), held_out=2)
    steps.train(store, "rex", METHOD)
    return store


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one / np.linalg.norm(one, axis=1, keepdims=True)) @ (other / np.linalg.norm(other, axis=1, keepdims=True)).T


def test_the_record_stands_beside_what_was_learned_and_is_explained(watched: Store):
    folder = watched.artifact(METHOD, "rex")
    files = read_json(folder / MANIFEST)["files"]
    assert {PROBES, PROBE_CURVES, PROBE_IMAGES, ENDED} <= files.keys()
    table = parquet.read_parquet(folder / PROBES)
    assert parquet.meanings_in(folder / PROBES) == MEANINGS and table.columns == list(MEANINGS)
    assert set(table["metric"]) == {"loss", "identity", "text", "balance", "copying", "drift"}
    # 60 steps of 2 rows cost 360 passes; of 0.375 of them 135 go to probes of 3 (2 + 4) = 18 each: 7
    moments = table.filter(pl.col("metric") == "identity")["step"].unique().sort().to_list()
    assert moments == [0, 10, 20, 30, 40, 50, 60]
    assert read_json(folder / ENDED)["stages"]["embedding"] == {"steps": 60, "of": 60, "learned": False, "kept": 60}
    with Image.open(folder / PROBE_IMAGES) as strip:
        assert strip.width > 7 * 160  # a column for each
    assert {"probes", "probe_images"} <= steps.train(watched, "rex", METHOD).images.keys()


def test_the_last_probe_is_of_what_was_learned_measured_by_hand(watched: Store):
    """The artifact samples the same prompts from the same noise, and its images are compared as files are."""
    base = load_base(watched)
    trained = restore(watched.artifact(METHOD, "rex"), base)
    prompts = [*(trained.say(template) for template in tiny_workspace.PROMPTS), "a photo of a dog"]
    noise = initial_noise(base, watched.sampling_seed, [(0, 0), (1, 0), (2, 0)])
    images = base.decode(sample(trained, base, prompts, noise, make_sampler("ddim", base), 1, 3.0)).numpy()
    identity = load_identity_encoder(watched.params.encoders.identity[0])
    clip = load_text_image_encoder(watched.params.encoders.text_image[0])

    files = concept_files.concept_images(watched.concept_folder("rex"))
    held_out = [path for path in files if path.name in split_of(watched, "rex").held_out]
    rest = [path for path in files if path not in held_out]
    assert len(held_out) == 2
    seen = identity.images([Image.fromarray(one) for one in images]).double().numpy()
    of = {
        name: identity.images([load_image(p) for p in paths]).double().numpy()
        for name, paths in (("out", held_out), ("in", rest))
    }
    texts = clip.texts(["a photo of a dog", "a photo of a dog on the beach"]).double().numpy()
    in_clip = clip.images([Image.fromarray(one) for one in images[:2]]).double().numpy()
    expected = {
        "identity": cosines(seen[:2], of["out"]).mean(axis=1),
        "copying": cosines(seen[:2], of["in"]).max(axis=1),
        "text": np.diag(cosines(in_clip, texts)),
    }
    expected["balance"] = np.sqrt(np.maximum(expected["identity"], 0) * np.maximum(expected["text"], 0))
    table = parquet.read_parquet(watched.artifact(METHOD, "rex") / PROBES).filter(pl.col("step") == 60)
    for metric, values in expected.items():
        np.testing.assert_allclose(table.filter(pl.col("metric") == metric)["value"], values, atol=1e-6)


def test_nothing_has_drifted_before_the_first_step(watched: Store):
    """The class noun reads no learned embedding, so what was learned does not reach its image at all."""
    table = parquet.read_parquet(watched.artifact(METHOD, "rex") / PROBES)
    drift = table.filter(pl.col("metric") == "drift")
    np.testing.assert_allclose(drift["value"], 0, atol=1e-6)
    assert set(drift["prompt"]) == {"a photo of a dog"}


def test_who_is_not_watched_learns_the_same_bytes(watched: Store, tmp_path: Path):
    alone = make(tmp_path, held_out=2, probes={"share": 0})
    steps.train(alone, "rex", METHOD)
    one, other = (store.artifact(METHOD, "rex") for store in (watched, alone))
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert train_stamp(alone, "rex", METHOD) == train_stamp(watched, "rex", METHOD)
    assert not (other / PROBE_IMAGES).exists() and not (other / PROBES).exists()


def test_of_images_that_are_not_held_out_identity_is_with_those_trained_on(tmp_path: Path):
    store = make(tmp_path)
    eye = Eye(store, training_inputs(store, "rex", METHOD), load_base(store))
    assert not eye.held_out


BY_PROBES = {"stop": "probes", "patience": 2, "share": 0.5}


def test_to_choose_by_identity_images_must_be_held_out(tmp_path: Path):
    store = make(tmp_path, {"adaptive": BY_PROBES})
    with pytest.raises(InputError, match="none is: set held_out in params.yaml"):
        steps.train(store, "rex", METHOD)
    (problem,) = steps.problems_of(store, ["rex"], [METHOD])  # before any training too
    assert "none is: set held_out in params.yaml" in str(problem)
    make_again = params(tmp_path, {"adaptive": {**BY_PROBES, "by": "text"}})
    store = tiny_workspace.write_params(tmp_path, make_again)  # as the message says
    steps.train(store, "rex", METHOD)
    assert (store.artifact(METHOD, "rex") / ENDED).is_file()


def test_a_share_that_is_too_small_is_refused_before_anything_is_read_or_trained(tmp_path: Path):
    store = make(tmp_path, {"adaptive": {**BY_PROBES, "share": 0.05}}, held_out=2)
    (problem,) = steps.problems_of(store, ["rex"], [METHOD])
    assert f"{METHOD} cannot be trained on 'rex': adaptive: share: 0.05 allows" in str(problem)
    assert not (store.data / "latents").exists()
    assert f"methods.{METHOD}.{store.params.base_model}.adaptive" in str(problem)
    larger = params(tmp_path, {"adaptive": BY_PROBES}, held_out=2)
    assert not steps.problems_of(tiny_workspace.write_params(tmp_path, larger), ["rex"], [METHOD])


def test_a_preset_is_changed_where_the_message_says(tmp_path: Path):
    """The method itself goes on to take all its steps."""
    store, preset = make(tmp_path), f"{METHOD}@adaptive"
    (problem,) = steps.problems_of(store, ["rex"], [METHOD, preset])
    assert f"ablations.{preset}.{store.params.base_model}.adaptive" in str(problem)
    values = params(tmp_path)
    values["ablations"] = {preset: {values["base_model"]: {"adaptive": {"window": 0.5, "share": 0.5}}}}
    store = tiny_workspace.write_params(tmp_path, values)
    assert not steps.problems_of(store, ["rex"], [METHOD, preset])
    assert store.params.config(METHOD).adaptive is None


class Enough(Exception):
    pass


def test_a_training_that_is_ended_leaves_what_it_took_and_the_costs_of_what_is_there(tmp_path: Path):
    store = make(tmp_path)

    def heard(done: float, metrics: object) -> None:
        if done > 0.5:
            raise Enough

    costs = store.training_costs(METHOD, "rex")
    with pytest.raises(Enough):
        steps.train(store, "rex", METHOD, heard=heard)
    assert read_json(costs).keys() == {"stamp", UNTIL_IT_ENDED} and read_json(costs)[UNTIL_IT_ENDED] > 0
    steps.train(store, "rex", METHOD)
    whole = read_json(costs)
    assert whole["training_seconds"] > 0 and whole["probe_seconds"] > 0 and UNTIL_IT_ENDED not in whole
    again = tiny_workspace.write_params(tmp_path, params(tmp_path, {"lr": 1e-4}))
    with pytest.raises(Enough):
        steps.train(again, "rex", METHOD, heard=heard)
    assert read_json(costs) == whole


def test_what_ends_a_training_is_part_of_its_stamp(tmp_path: Path):
    store = make(tmp_path, {"adaptive": BY_PROBES}, held_out=2)
    before = train_stamp(store, "rex", METHOD)
    changed = params(tmp_path, {"adaptive": BY_PROBES}, held_out=2, probes={"share": 0.5, "prompts": 1, "steps": 1})
    assert train_stamp(tiny_workspace.write_params(tmp_path, changed), "rex", METHOD) != before


def test_the_preset_adaptive_is_a_column_of_its_own(tmp_path: Path):
    store = make(tmp_path, {"steps": 120, "batch_size": 4})
    method = f"{METHOD}@adaptive"
    report = steps.train(store, "rex", method)
    ended = json.loads((store.artifact(method, "rex") / ENDED).read_text())
    assert report.metrics["steps"] == ended["steps"] and report.metrics["steps_saved"] == 120 - ended["steps"]
    assert read_json(store.artifact(method, "rex") / "config.json")["config"]["adaptive"]["stop"] == "loss"
    steps.sample_grid(store, "rex", method)
    steps.score(store, "rex", method)


def test_what_learns_nothing_has_nothing_to_watch(tmp_path: Path):
    store = make(tmp_path)
    steps.train(store, "rex", "base_model")
    assert not (store.artifact("base_model", "rex") / ENDED).exists()
