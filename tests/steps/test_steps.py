"""The steps: files appear where they should, once, whole, and again only when something they depend on changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from personalize_core import steps
from personalize_core.base_model import compiling
from personalize_core.base_model.compiling import CompiledBlocks
from personalize_core.concepts.image_files import load_image
from personalize_core.errors import InputError
from personalize_core.files import stamps
from personalize_core.files.atomic import read_json
from personalize_core.methods import METHOD_NAMES, recipe_class
from personalize_core.methods.recipe import Ablation
from personalize_core.metrics import tables
from personalize_core.report import comparison_in_words
from personalize_core.report.figures import image_grids, losses
from personalize_core.steps import input_checks
from personalize_core.steps.class_images import TOGETHER
from personalize_core.steps.latents import read_latents
from personalize_core.workspace import recipes
from personalize_core.workspace.recipes import load_base, preprocessing_of
from personalize_core.workspace.stamps import sampling as sampling_stamps
from personalize_core.workspace.stamps.made import artifact_stamp
from personalize_core.workspace.store import REFERENCES, Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHODS = ["base_model", "textual_inversion", "dreambooth", "personalized_residuals"]


def run_everything(store: Store) -> list[steps.Report]:
    reports = []
    for concept in store.concept_names():
        for method in store.params.method_names:
            reports += [one(store, concept, method) for one in (steps.train, steps.sample_grid, steps.score)]
        reports.append(steps.score_references(store, concept))
    return [*reports, steps.compare(store)]


def bytes_under(folder: Path) -> dict[str, bytes]:
    """Apart from what was measured, which differs from run to run and has a folder of its own for that reason."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".work", "costs"} & {*path.parts}
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which everything has run."""
    store = tiny_workspace.make(tmp_path_factory.mktemp("finished"))
    run_everything(store)
    return store.root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    """The same workspace, for a test to change; its models stay where they are."""
    shutil.copytree(finished / "data", tmp_path / "data")
    shutil.copy(finished / "params.yaml", tmp_path / "params.yaml")
    return Store(tmp_path)


def changed(store: Store, change) -> Store:
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    change(values)
    return tiny_workspace.write_params(store.root, values)


def made_again(store: Store) -> set[str]:
    """Which results a second run makes anew, as paths without their root."""
    return {
        report.path.relative_to(store.data).as_posix().removesuffix("/scores.parquet")
        for report in run_everything(store)
        if not report.skipped
    }


def test_every_concept_and_method_has_artifact_grid_and_scores(store: Store):
    for concept in ("cup", "rex"):
        for method in METHODS:
            assert (store.artifact(method, concept) / "weights.safetensors").is_file()
            assert (store.grid(method, concept) / "grid.png").is_file()
            table = tables.read(store.scores(method, concept) / "scores.parquet")
            texts = {"clip_t", "clip_t_scaled", "clip_t_slot_deleted", "clip_t_slot_deleted_scaled"}
            assert set(table["metric"]) == {*texts, "clip_i", "dino"}
        assert set(tables.read(store.scores(REFERENCES, concept) / "scores.parquet")["metric"]) == {"clip_i", "dino"}


def test_a_second_run_makes_nothing(store: Store):
    assert made_again(store) == set()


def test_the_same_inputs_give_the_same_bytes_in_another_folder(finished: Path, tmp_path: Path):
    other = Store(tmp_path)
    shutil.copy(finished / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(finished / "data" / "prompts", tmp_path / "data" / "prompts")
    shutil.copytree(finished / "data" / "concepts", tmp_path / "data" / "concepts")
    torch.manual_seed(99)  # the global stream must not matter
    run_everything(other)
    assert bytes_under(other.data) == bytes_under(finished / "data")


def test_changing_one_methods_recipe_makes_only_what_depends_on_it(store: Store):
    base = store.params.base_model
    store = changed(store, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.1))
    results = {
        f"{kind}/textual_inversion/{name}" for kind in ("artifacts", "grids", "metrics") for name in ("cup", "rex")
    }
    assert made_again(store) == results | {"comparison"}


def test_another_list_of_training_prompts_trains_again_and_encodes_nothing(store: Store, monkeypatch):
    plain = stamps.sha256
    monkeypatch.setattr(stamps, "sha256", lambda path: plain(path) + "edited" * (path.name == "ti_object_27.txt"))
    assert steps.encode_images(store, "rex").skipped
    assert not steps.train(store, "rex", "textual_inversion").skipped


def test_changing_one_concept_image_makes_only_what_depends_on_its_concept(store: Store):
    Image.new("RGB", (20, 20), "red").save(store.concept_folder("rex") / "0.png")
    results = {f"{kind}/{method}/rex" for kind in ("artifacts", "grids", "metrics") for method in METHODS}
    # the base model learns nothing, but its scores compare with the concept images
    assert made_again(store) == results | {f"metrics/{REFERENCES}/rex", "comparison"}


def test_another_number_of_sampling_steps_trains_nothing(store: Store):
    store = changed(store, lambda values: values["sampling"].update(steps=3))
    assert not any(path.startswith("artifacts/") for path in made_again(store))


def test_a_result_with_a_missing_file_is_made_again(store: Store):
    (store.grid("dreambooth", "rex") / "dreambooth" / "00_00.png").unlink()
    assert made_again(store) == {"grids/dreambooth/rex"}


def test_class_images_are_made_once_for_concepts_of_one_class_noun(store: Store, tmp_path: Path):
    tiny_workspace.paint_concept_images(tmp_path / "photos" / "max", count=2, seed=9)
    from personalize_core.concepts import concept_files

    concept_files.add_concept(store.concepts, tmp_path / "photos" / "max", "dog")
    before = bytes_under(store.class_images("dog"))
    assert not steps.train(store, "max", "dreambooth").skipped
    assert bytes_under(store.class_images("dog")) == before


def only(store: Store, method: str, **recipe) -> Store:
    """One method in params.yaml."""

    def change(values):
        values["methods"], values["variants"] = {method: {values["base_model"]: recipe}}, {}

    return changed(store, change)


def seen(store: Store, concept: str, method: str) -> Any:
    """What a method trains on, as its training reads it."""
    recipe = preprocessing_of(store, method).of_class_images
    noun = store.concept(concept).class_noun
    return read_latents(store, concept, method, store.class_latents(noun, recipe.key))


def test_an_ablation_that_params_do_not_name_trains_on_what_it_asks_for_itself(store: Store, monkeypatch):
    store = only(store, "personalized_residuals", steps=2, batch_size=2, rank_fraction=0.25)
    shutil.rmtree(store.data / "latents")
    shutil.rmtree(store.data / "class_images")
    name = "personalized_residuals@regularization_images"
    assert not steps.train(store, "rex", name).skipped  # without its class images training would stop
    assert len(seen(store, "rex", name).class_images) == 200
    short = {"regularization": "none", "steps": 2, "batch_size": 2}
    monkeypatch.setitem(recipe_class("custom_diffusion").ablations, "without_regularization", Ablation(short))
    assert not steps.train(store, "rex", "custom_diffusion@without_regularization").skipped


def test_another_method_makes_no_artifact_anew_whatever_it_asks_for(store: Store):
    base, short = store.params.base_model, {"steps": 2, "batch_size": 2}
    own = bytes_under(store.class_images("dog"))
    before = seen(store, "rex", "dreambooth").class_images

    def change(values):
        values["methods"]["custom_diffusion"] = {base: {**short, "class_images": 11}}  # zoomed, and more
        values["methods"]["oft"] = {base: {**short, "class_images": 9}}  # more of those that dreambooth sees
        values["methods"]["personalized_residuals"][base]["class_images"] = 2

    store = changed(store, change)
    made = {path for path in made_again(store) if path.startswith("artifacts/")}
    changed_methods = ("custom_diffusion", "oft", "personalized_residuals")
    assert made == {f"artifacts/{method}/{name}" for method in changed_methods for name in ("cup", "rex")}
    now = bytes_under(store.class_images("dog"))
    assert {name: now[name] for name in own if name.endswith(".png")} == {
        name: content for name, content in own.items() if name.endswith(".png")
    }
    assert len(now) > len(own)
    after = seen(store, "rex", "dreambooth").class_images
    assert len(before) == len(after) == 2
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    asked = {name: len(seen(store, "rex", name).class_images) for name in changed_methods}
    assert asked == {"custom_diffusion": 11, "oft": 9, "personalized_residuals": 2}


def test_class_images_are_the_same_bytes_whether_sampled_at_once_or_one_method_after_another(store: Store):
    def images(store: Store) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in store.class_images("dog").glob("*.png")}

    store = changed(store, lambda values: values["methods"]["dreambooth"][values["base_model"]].update(class_images=11))
    assert len(images(store)) == TOGETHER
    steps.make_class_images(store, "dog")
    extended = images(store)
    assert len(extended) == 2 * TOGETHER  # whole batches
    shutil.rmtree(store.class_images("dog"))
    assert not steps.make_class_images(store, "dog").skipped
    assert images(store) == extended
    assert steps.make_class_images(store, "dog").skipped


def test_concept_images_are_encoded_anew_for_none_but_the_method_that_prepares_them_otherwise(store: Store):
    def stamps() -> dict[str, str]:
        found = store.latents("rex").glob("*/manifest.json")
        return {path.parent.name: json.loads(path.read_text())["stamp"] for path in found}

    before, whole = stamps(), steps.encode_images(store, "rex")
    assert set(before) == {preprocessing_of(store, name).key for name in METHODS} and whole.skipped
    store = changed(store, lambda values: values["methods"].update(ti_db={}))
    again = steps.encode_images(store, "rex")
    assert not again.skipped and again.stamp == whole.stamp  # nothing behind the others is out of date
    assert set(stamps()) == {*before, preprocessing_of(store, "ti_db").key}
    assert all(stamps()[key] == stamp for key, stamp in before.items())
    assert all(steps.train(store, "rex", method).skipped for method in METHODS)


def test_the_scores_of_a_grid_are_those_of_its_images(store: Store):
    """Recomputed with plain calls of open_clip and transformers and NumPy, from the files."""
    import open_clip
    from transformers import ViTModel

    models = Path(store.params.base_model).parent
    clip: Any = open_clip.create_model(f"local-dir:{models / 'clip'}").eval()
    vit = ViTModel.from_pretrained(models / "identity", add_pooling_layer=False).eval()

    def pixels(path: Path) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        short = min(image.size)
        width, height = (16 * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 16) / 2), round((height - 16) / 2)
        values = np.asarray(image.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 255
        return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)[None]

    def unit(features: torch.Tensor) -> np.ndarray:
        values = features.detach().double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    path = store.grid("dreambooth", "rex") / "dreambooth" / "01_00.png"
    concept_images = torch.cat([pixels(store.concept_folder("rex") / f"{i}.png") for i in range(3)])
    image, text = pixels(path), open_clip.get_tokenizer("ViT-B-32")(["a photo of a dog on the beach"])
    expected = {
        "clip_t": float((unit(clip.encode_image(image)) @ unit(clip.encode_text(text)).T).item()),
        "clip_i": float((unit(clip.encode_image(image)) @ unit(clip.encode_image(concept_images)).T).mean()),
    }
    table = tables.read(store.scores("dreambooth", "rex") / "scores.parquet")
    rows = table.filter(table["image"] == path.relative_to(store.root).as_posix())
    scores = dict(zip(rows["metric"], rows["score"], strict=True))
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert scores["clip_t_scaled"] == pytest.approx(2.5 * max(expected["clip_t"], 0), abs=1e-5)

    def squashed(path: Path) -> torch.Tensor:
        image = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
        values = np.asarray(image, dtype=np.float32) / 255
        return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)[None]

    references = torch.cat([squashed(store.concept_folder("rex") / f"{i}.png") for i in range(3)])
    with torch.no_grad():
        seen, known = (vit(batch).last_hidden_state[:, 0] for batch in (squashed(path), references))
    assert scores["dino"] == pytest.approx(float((unit(seen) @ unit(known).T).mean()), abs=1e-5)


def test_the_comparison_lists_what_is_missing(store: Store):
    shutil.rmtree(store.scores("dreambooth", "rex"))
    steps.compare(store)
    summary = json.loads((store.comparison() / "summary.json").read_text())
    assert summary["missing"] == ["dreambooth/rex"]
    assert "dreambooth" in summary["means"]  # the other concept's


def test_an_ablation_that_was_scored_is_compared_though_params_do_not_name_it(store: Store):
    name = "personalized_residuals@kv"
    for one in (steps.train, steps.sample_grid, steps.score):
        one(store, "rex", name)
    assert not steps.compare(store).skipped
    summary = json.loads((store.comparison() / "summary.json").read_text())
    assert set(summary["means"]) == {*METHODS, "personalized_residuals_lag", name, REFERENCES}
    assert summary["missing"] == []  # it was not asked for on the other concept
    shutil.copytree(store.scores(name, "rex"), store.scores("personalized_residuals@no_such", "rex"))
    about = store.grid(name, "rex") / "grid.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model": "another"}))
    steps.compare(store)
    assert name not in json.loads((store.comparison() / "summary.json").read_text())["means"]


def test_an_ablation_of_ones_own_is_a_column_beside_its_method(store: Store):
    name, plain, base = "personalized_residuals@rank_half", "personalized_residuals", store.params.base_model
    kept = bytes_under(store.artifact(plain, "rex"))
    store = changed(store, lambda values: values.update(ablations={name: {base: {"rank_fraction": 0.5}}}))
    assert [(cell.concept, cell.method, cell.first) for cell in steps.plan(store)] == [
        (concept, name, "train") for concept in ("cup", "rex")
    ]
    run_everything(store)
    assert bytes_under(store.artifact(plain, "rex")) == kept and steps.plan(store) == []
    learned, its_methods = (
        read_json(store.artifact(method, "rex") / "config.json")["parameters"] for method in (name, plain)
    )
    assert learned == 2 * its_methods
    summary = json.loads((store.comparison() / "summary.json").read_text())
    assert name in summary["means"] and summary["missing"] == []
    found = {place.kind for place in steps.results_there(store, ["rex"]) if place.method == name}
    assert found == {"artifact", "image_grid", "metrics"}
    page = steps.report(store).path.read_text()
    assert "Personalized Residuals: rank half" in page
    left = bytes_under(store.artifact(name, "rex"))
    store = changed(store, lambda values: None)
    with pytest.raises(InputError, match="has no ablation 'rank_half'"):
        steps.train(store, "rex", name)
    assert not steps.compare(store).skipped and bytes_under(store.artifact(name, "rex")) == left
    assert name not in json.loads((store.comparison() / "summary.json").read_text())["means"]


def test_a_comparison_ranks_every_variant_and_says_what_it_cost(store: Store):
    folder, variants = store.comparison(), {*METHODS, "personalized_residuals_lag"}
    ranked, pairs = (pl.read_parquet(folder / f"{name}.parquet") for name in ("rank", "pairs"))
    assert set(ranked["variant"]) == variants and (ranked["place_from"] <= ranked["place_to"]).all()
    assert len(pairs) == ranked["metric"].n_unique() * len(variants) * (len(variants) - 1) // 2
    summary = pl.read_parquet(folder / "summary.parquet")
    about = json.loads((store.artifact("dreambooth", "rex") / "config.json").read_text())
    costs = summary.filter(method="dreambooth", concept="rex")
    assert set(costs["parameters"]) == {about["parameters"]}
    weights = store.artifact("dreambooth", "rex") / "weights.safetensors"
    assert set(costs["artifact_bytes"]) == {weights.stat().st_size}
    heading, *rows = comparison_in_words.verdicts(folder)
    assert len(heading) == 4 and len(rows) == len(comparison_in_words.METRICS) * len(variants)
    assert comparison_in_words.intervals_are_over(folder) == "95 % intervals over prompts, about these concepts alone"


def test_a_comparison_shows_every_concept_and_all_of_them(store: Store):
    names = {path.name for path in store.comparison().glob("*.png")}
    pairs = {f"{kind}_{concept}.png" for kind in ("grid", "identity_vs_text") for concept in ("cup", "rex")}
    assert names == pairs | {"identity_vs_text.png"}


@pytest.mark.parametrize(
    "call",
    [
        lambda store: steps.sample_grid(store, "rex", "textual_inversion"),
        lambda store: steps.sample_prompts(store, "rex", "textual_inversion", ["<rex>"], 1),
        lambda store: steps.heat_maps(store, "rex", "textual_inversion", "<rex>"),
        lambda store: steps.export(store, "rex", "textual_inversion", store.root / "out"),
    ],
    ids=["sample grid", "sample", "heat maps", "export"],
)
def test_an_artifact_that_lies_in_another_methods_folder_is_never_used(call, store: Store):
    """Not even where the images that were drawn with it are there already."""
    folder, grid = (place("textual_inversion", "rex") for place in (store.artifact, store.grid))
    shutil.rmtree(folder)
    shutil.copytree(store.artifact("dreambooth", "rex"), folder)
    before = bytes_under(grid)
    with pytest.raises(InputError, match="holds what dreambooth has learned, not textual_inversion"):
        call(store)
    assert bytes_under(grid) == before and not (store.root / "out").exists()
    assert not (store.data / "samples").exists()


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"method": "dreambooth"}, "holds what dreambooth has learned, not textual_inversion"),
        ({"base_model": {"name": "another", "weights_hash": "0123"}}, "or remove it and import again"),
    ],
    ids=["another method's", "another base model's"],
)
def test_what_was_imported_for_something_else_is_refused_before_anything_is_trained(about, said, store: Store):
    path = store.artifact("textual_inversion", "rex") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imported": "rex.safetensors"} | about))
    for refused in (
        lambda: steps.train(store, "rex", "textual_inversion"),
        lambda: steps.check_inputs(store, ["cup", "rex"], ["base_model", "textual_inversion"]),
    ):
        with pytest.raises(InputError, match=said):
            refused()


def test_samples_of_the_users_own_prompt_are_images_of_the_models_size(store: Store):
    report = steps.sample_prompts(store, "rex", "personalized_residuals", ["<rex> dog in the desert"], images=2)
    assert [load_image(path).size for path in report.images.values()] == [(16, 16)] * 2
    assert list(report.images) == ["<rex> dog in the desert 1", "<rex> dog in the desert 2"]
    described = json.loads((report.path / "samples.json").read_text())
    assert described["prompts"] == ["<rex> dog in the desert"] * 2


def test_samples_are_made_again_once_what_samples_them_is_another_program(store: Store, monkeypatch):
    """As image grids, heat maps and interpolations are."""
    asked = (store, "rex", "personalized_residuals", ["a photo of <rex>"], 1)
    assert not steps.sample_prompts(*asked).skipped and steps.sample_prompts(*asked).skipped
    hashed = sampling_stamps.sources_hash
    monkeypatch.setattr(
        sampling_stamps, "sources_hash", lambda names: "another" if "sampling/sampler" in names else hashed(names)
    )
    assert not steps.sample_prompts(*asked).skipped


def test_two_concepts_in_one_image_are_sampled_from_their_own_artifacts(store: Store):
    cells = [("rex", "personalized_residuals"), ("cup", "personalized_residuals")]
    prompt = f"a photo of <rex> next to {store.concept('cup').placeholder}"
    report = steps.sample_several_concepts(store, cells, [prompt], images=2)
    assert [load_image(path).size for path in report.images.values()] == [(16, 16)] * 2
    described = json.loads((report.path / "samples.json").read_text())
    nouns = [store.concept(name).class_noun for name, _ in cells]
    assert described["said"] == [f"a photo of <rex> {nouns[0]} next to <cup> {nouns[1]}"] * 2
    again = steps.sample_several_concepts(store, cells, [prompt], images=2)
    assert again.skipped and again.metrics == report.metrics
    assert set(report.metrics) == {f"{part}.{name}" for part in ("rex", "cup") for name in ("rex", "cup")}


def test_the_parts_of_a_image_are_called_by_the_order_of_its_prompt(store: Store, monkeypatch):
    alike = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])  # (images, parts from the left, concepts)
    monkeypatch.setattr("personalize_core.metrics.several_concepts.identity_of_parts", lambda *given: alike)
    cells = [("rex", "personalized_residuals"), ("cup", "personalized_residuals")]
    prompts = ["<rex> beside <cup>", "<cup> beside <rex>"]
    metrics = steps.sample_several_concepts(store, cells, prompts, images=1).metrics
    assert metrics == {"rex.rex": (1 + 7) / 2, "rex.cup": (2 + 8) / 2, "cup.rex": (3 + 5) / 2, "cup.cup": (4 + 6) / 2}


def test_a_way_between_two_concepts_begins_and_ends_with_their_own_images(store: Store, monkeypatch):
    cells = ("rex", "textual_inversion"), ("cup", "textual_inversion")
    drawn, draw = [], image_grids.comparison_grid
    monkeypatch.setattr(image_grids, "comparison_grid", lambda *given: drawn.append(given) or draw(*given))
    report = steps.sample_between(store, cells, ["a photo of a <rex>"], points=3, images=2)
    ((_, rows, columns, _, title),) = drawn
    assert list(rows) == ["1. a photo of a <rex>, noise 1", "2. a photo of a <rex>, noise 2"]
    assert columns == ["rex, by Textual Inversion", "0.500 of the way", "cup, by Textual Inversion"]
    assert title == "From rex to cup"
    assert [path.relative_to(path.parents[1]).as_posix() for ((path,), *_) in rows.values()] == [
        f"0.000/00_0{image}.png" for image in (0, 1)
    ]
    shares = ("0.000", "0.500", "1.000")
    made = {share: [(report.path / share / f"00_0{image}.png").read_bytes() for image in (0, 1)] for share in shares}
    for share, name in (("0.000", "rex"), ("1.000", "cup")):
        alone = steps.sample_prompts(store, name, "textual_inversion", [f"a photo of a <{name}>"], images=2)
        assert made[share] == [path.read_bytes() for path in alone.images.values()]
    assert len({content for each in made.values() for content in each}) == 6
    assert set(report.metrics) == {f"{share}.{name}" for share in shares for name in ("rex", "cup")}
    strips = load_image(report.images["strips"])
    assert strips.width > 3 * 160 and strips.height > 2 * 160  # a row of three cells for each noise
    again = steps.sample_between(store, cells, ["a photo of a <rex>"], points=3, images=2)
    assert again.skipped and again.metrics == report.metrics


def test_what_is_no_way_between_two_words_is_refused(store: Store):
    first, second = ("rex", "textual_inversion"), ("cup", "textual_inversion")
    for cells, points, prompt, said in (
        ((first, first), 3, "<rex>", "'rex' is named twice"),
        ((first, second), 2, "<rex>", "2 points are no way"),
        ((first, second), 3, "<cup>", "does not mention the concept 'rex'"),
        ((first, ("nobody", "dti")), 3, "<rex>", "there is no concept 'nobody' in "),
        ((("nobody", "dti"), second), 3, "<rex>", "there is no concept 'nobody' in "),
    ):
        with pytest.raises(InputError, match=said):
            steps.sample_between(store, cells, [prompt], points, images=1)


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name not in ("textual_inversion", "dti")])
def test_a_method_without_a_word_alone_leads_nowhere_whatever_it_was_trained_on(method, store: Store):
    word = ("nobody", "textual_inversion")
    for cells in ((("nobody", method), word), (word, ("nobody", method))):
        with pytest.raises(
            InputError, match=f"^{method} does not learn one word and .*; take textual_inversion or dti"
        ):
            steps.sample_between(store, cells, ["<rex>"], 1, images=1)


def test_a_concept_that_is_not_there_is_said_to_be_none(store: Store, tmp_path):
    for act in (
        lambda: steps.sample_prompts(store, "nobody", "dti", ["<nobody>"], 1),
        lambda: steps.heat_maps(store, "nobody", "dti", "<nobody>"),
        lambda: steps.sample_several_concepts(store, [("rex", "dti"), ("nobody", "dti")], ["<rex> <nobody>"], 1),
        lambda: steps.export(store, "nobody", "dti", tmp_path / "out"),
        lambda: artifact_stamp(store, "nobody", "dti"),
    ):
        with pytest.raises(InputError, match=r"^there is no concept 'nobody' in .*; there are .*cup.* and rex\."):
            act()


def test_a_placeholder_of_a_concept_that_is_not_shown_is_no_word_of_a_prompt(store: Store):
    """The base model would read it as letters."""
    method, prompt = "textual_inversion", "<rex> beside <cup>, <mug-2> and <mug-2>"
    both = ("rex", method), ("cup", method)
    for act, others in (
        (lambda: steps.sample_prompts(store, "rex", method, [prompt], 1), "'<cup>' and '<mug-2>'"),
        (lambda: steps.heat_maps(store, "rex", method, prompt), "'<cup>' and '<mug-2>'"),
        (lambda: steps.sample_between(store, both, [prompt], 3, 1), "'<cup>' and '<mug-2>'"),
        (lambda: steps.sample_several_concepts(store, both, [prompt], 1), "'<mug-2>'"),
    ):
        with pytest.raises(InputError, match=f"^the prompt has {others}, which stands for no concept of these images"):
            act()


def test_heat_maps_are_of_the_image_that_the_same_noise_samples_and_each_variant_has_a_row(store: Store):
    method, prompt = "personalized_residuals", "<rex> in the desert"
    report = steps.heat_maps(store, "rex", method, prompt)
    kept = load_file(report.path / "maps.safetensors")
    described = json.loads((report.path / "heat_maps.json").read_text())
    assert set(kept) == set(described["maps"]) == {method, f"{method}_lag"}
    words = [row["word"] for row in described["maps"][method]["words"]]
    assert words == ["<rex>", "dog", "in", "the", "desert"]
    assert all(maps.shape == (5, 64, 64) and maps.min() >= 0 for maps in kept.values())
    assert (kept[method] != kept[f"{method}_lag"]).any()
    assert report.images["heat maps"].is_file()
    assert steps.heat_maps(store, "rex", method, prompt).skipped
    other = steps.heat_maps(store, "rex", method, prompt, image=1)
    assert (load_file(other.path / "maps.safetensors")[method] != kept[method]).any()


def test_other_nouns_have_a_row_of_heat_maps_beside_the_concept_with_the_same_columns(store: Store, monkeypatch):
    from personalize_core.analyses import heat_maps as analysis

    shown: dict[str, Any] = {}
    save = analysis.save_grid
    monkeypatch.setattr(
        analysis,
        "save_grid",
        lambda found, images, path, title: shown.update({path.name: found}) or save(found, images, path, title),
    )
    method, prompt = "personalized_residuals", "a photo of <rex> on the beach"
    report = steps.heat_maps(store, "rex", method, prompt, nouns=["teddy bear", "dog"])
    assert report.images["other nouns"].is_file()
    rows, own = shown["other_nouns.png"], shown["heat_maps.png"]
    assert list(rows) == [method, f"{method}_lag", "teddy bear", "dog"]
    for maps in rows.values():
        assert maps.words == ["a", "photo", "of", analysis.THE_NOUN, "on", "the", "beach"] and len(maps.maps) == 7
    torch.testing.assert_close(rows[method].maps[3], own[method].maps[3:5].sum(dim=0))  # "<rex>" and "dog"
    assert torch.equal(rows[method].maps[4:], own[method].maps[5:])
    steps.train(store, "rex", "base_model")
    kept = load_file(steps.heat_maps(store, "rex", "base_model", prompt).path / "maps.safetensors")["base_model"]
    torch.testing.assert_close(rows["dog"].maps, kept)  # the concept's own noun, which the base model reads there
    with pytest.raises(InputError, match="must name the concept once"):
        steps.heat_maps(store, "rex", method, "<rex> by <rex>", nouns=["dog"])
    with pytest.raises(InputError, match="cannot be a class noun"):
        steps.heat_maps(store, "rex", method, "<rex>", nouns=["7"])


def test_a_noun_that_is_called_as_a_variant_is_has_a_row_of_its_own(store: Store, monkeypatch):
    from personalize_core.analyses import heat_maps as analysis

    shown: dict[str, Any] = {}
    monkeypatch.setattr(analysis, "save_grid", lambda found, images, path, title: shown.update({path.name: found}))
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    tiny_workspace.write_params(store.root, values | {"variants": {"personalized_residuals": {"dog": {"lag": False}}}})
    changed = Store(store.root)
    steps.heat_maps(changed, "rex", "personalized_residuals", "a <rex>", nouns=["dog"])
    rows, own = shown["other_nouns.png"], shown["heat_maps.png"]["dog"]
    assert list(rows) == ["dog", "dog (the noun)"]
    torch.testing.assert_close(rows["dog"].maps[1], own.maps[1:].sum(dim=0))  # "<rex>" and "dog", of the method


@pytest.mark.parametrize("changed", [{"image_size": 24}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize(
    "ask",
    [
        lambda store: steps.heat_maps(store, "rex", "textual_inversion", "<rex>"),
        lambda store: steps.sample_prompts(store, "rex", "textual_inversion", ["<rex>"], 1),
        lambda store: steps.sample_several_concepts(
            store,
            [("rex", "textual_inversion"), ("cup", "textual_inversion")],
            [f"<rex> {store.concept('cup').placeholder}"],
            1,
        ),
        lambda store: steps.sample_between(
            store, (("rex", "textual_inversion"), ("cup", "textual_inversion")), ["<rex>"], 3, 1
        ),
    ],
    ids=["heat maps", "sample", "compose", "interpolate"],
)
def test_what_was_asked_for_is_made_again_at_another_size_or_precision(ask, changed, store: Store, monkeypatch):
    stamps: list[str] = []

    def looked_for(folder: Path, stamp: str) -> bool:
        stamps.append(stamp)
        raise InputError("enough")

    monkeypatch.setattr("personalize_core.steps.requested_images.is_up_to_date", looked_for)
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    for each in (values, values | changed):
        tiny_workspace.write_params(store.root, each)
        with pytest.raises(InputError, match="enough"):
            ask(Store(store.root))
    assert len(set(stamps)) == 2


def test_what_cannot_share_a_image_is_refused(store: Store):
    cells = [("rex", "personalized_residuals"), ("cup", "personalized_residuals")]
    prompt = f"a photo of <rex> next to {store.concept('cup').placeholder}"
    with pytest.raises(InputError, match="does not mention the concept 'cup'"):
        steps.sample_several_concepts(store, cells, ["a photo of <rex>"], images=2)
    with pytest.raises(InputError, match="DreamBooth cannot share an image"):
        steps.sample_several_concepts(store, [cells[0], ("cup", "dreambooth")], [prompt], images=2)


def test_lag_and_plain_sampling_sample_differently_from_one_artifact(store: Store):
    grid = store.grid("personalized_residuals", "rex")
    weights = load_file(store.artifact("personalized_residuals", "rex") / "weights.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if name.endswith(".B"))  # something was learned
    plain, lag = (
        np.stack([np.asarray(load_image(path)) for path in sorted((grid / variant).glob("*.png"))])
        for variant in ("personalized_residuals", "personalized_residuals_lag")
    )
    assert plain.shape == lag.shape and (plain != lag).any()


def test_training_leaves_the_curve_of_its_log(store: Store, tmp_path: Path, real_loss_curve):
    folder = store.artifact("textual_inversion", "rex")
    shutil.rmtree(folder)
    steps.train(store, "rex", "textual_inversion")
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    probes = pl.read_parquet(folder / "probes.parquet").filter(metric="loss")
    taken = {step: probes.filter(step=step)["value"].to_list() for step in probes["step"].unique().sort()}
    assert min(taken) == 0, "before the first step"
    stage = rows[0]["stage"]
    seen = [{"stage": stage, "step": step, "value": sum(values)} for step, values in taken.items()]
    losses.loss_curve(rows, tmp_path / "loss.png", fixed_inputs=seen)
    assert (folder / "loss.png").read_bytes() == (tmp_path / "loss.png").read_bytes()


def test_gradient_checkpointing_trains_to_the_same_weights(store: Store):
    before = load_file(store.artifact("dreambooth", "rex") / "weights.safetensors")
    store = changed(store, lambda values: values.update(gradient_checkpointing=True))
    assert not steps.train(store, "rex", "dreambooth").skipped
    after = load_file(store.artifact("dreambooth", "rex") / "weights.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-5)
    assert not load_base(store).unet.is_gradient_checkpointing  # as it went in


def test_compiled_blocks_are_asked_for_in_training_and_sampling_and_their_results_are_told_apart(
    store: Store, monkeypatch
):
    """What is traced is run as it is, which changes no bit; so all that makes results differ here is their stamp."""
    backends: list[str] = []

    def blocks_as_they_are(blocks, backend: str) -> CompiledBlocks:
        backends.append(backend)
        made = CompiledBlocks(blocks, "eager")
        made.backend = backend
        return made

    monkeypatch.setattr(compiling, "CompiledBlocks", blocks_as_they_are)
    monkeypatch.setattr(recipes, "check_compiler", lambda device: None)
    trained, sampled = store.artifact("textual_inversion", "rex"), store.grid("textual_inversion", "rex")
    weights, grid = (trained / "weights.safetensors").read_bytes(), (sampled / "grid.png").read_bytes()
    store = changed(store, lambda values: values.update(compile=True))
    for step in (steps.train, steps.sample_grid):
        assert not step(store, "rex", "textual_inversion").skipped
        assert step(store, "rex", "textual_inversion").skipped
        assert backends == ["inductor"]  # once in a process
    assert (trained / "weights.safetensors").read_bytes() == weights and (sampled / "grid.png").read_bytes() == grid
    base = load_base(store)
    assert not any("forward" in vars(module) for module in base.unet.modules())
    store = changed(store, lambda values: values.update(compile=False))
    assert not steps.train(store, "rex", "textual_inversion").skipped
    assert backends == ["inductor"]


def test_without_a_compiler_nothing_is_begun(store: Store, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    store = changed(store, lambda values: values.update(compile=True))
    with pytest.raises(InputError, match="C\\+\\+ compiler.*no-such-compiler"):
        steps.train(store, "rex", "textual_inversion")


def test_micro_batches_train_to_the_same_losses_and_keep_the_stamp(store: Store):
    folder = store.artifact("dreambooth", "rex")

    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]

    rows, stamp = logged(), read_json(folder / "manifest.json")["stamp"]
    store = changed(store, lambda values: values.update(micro_batch=1))
    assert steps.train(store, "rex", "dreambooth").skipped
    shutil.rmtree(folder)
    assert not steps.train(store, "rex", "dreambooth").skipped
    assert read_json(folder / "manifest.json")["stamp"] == stamp
    assert read_json(store.training_costs("dreambooth", "rex"))["micro_batch"] == 1
    for row, before in zip(logged(), rows, strict=True):
        for name in ("diffusion", "gradient_norm"):
            assert row[name] == pytest.approx(before[name], rel=1e-4)


def test_a_single_concept_image_goes_through_the_whole_chain(store: Store, tmp_path: Path):
    from personalize_core.concepts import concept_files

    def change(values):
        short = {"steps": 2, "batch_size": 2}
        values["methods"] = {"base_model": {}, "vico": {values["base_model"]: short}}
        values["variants"] = {}

    store = changed(store, change)
    for name in store.concept_names():
        shutil.rmtree(store.concept_folder(name))
    tiny_workspace.paint_concept_images(tmp_path / "photos" / "solo", count=1, seed=9)
    concept_files.add_concept(store.concepts, tmp_path / "photos" / "solo", "dog")
    run_everything(store)
    assert load_file(store.artifact("vico", "solo") / "weights.safetensors")["references"].shape == (1, 4, 8, 8)
    assert tables.read(store.scores(REFERENCES, "solo") / "scores.parquet").is_empty()  # nothing to compare it with
    summary = json.loads((store.comparison() / "summary.json").read_text())
    assert set(summary["means"]) == {"base_model", "vico"} and summary["missing"] == []


def with_refinement(store: Store, **options) -> Store:
    """Textual Inversion in two variants from one artifact: plain, and with test-time optimization."""
    refined = {"test_time_optimization": {"steps": 2, "batch_size": 2, "lr": 0.3, **options}}
    variants = {"textual_inversion": {}, "refined": refined}
    return changed(store, lambda values: values["variants"].update(textual_inversion=variants))


def test_test_time_optimization_samples_otherwise_from_an_artifact_that_stays_as_it_is(store: Store):
    name, concept, heard = "textual_inversion", "rex", []
    artifact, plain = (bytes_under(folder(name, concept)) for folder in (store.artifact, store.grid))
    store = with_refinement(store)
    assert steps.train(store, concept, name).skipped
    report = steps.sample_grid(store, concept, name, heard.append)
    assert bytes_under(store.artifact(name, concept)) == artifact
    sampled = bytes_under(report.path)
    places = [path.removeprefix(f"{name}/") for path in plain if path.startswith(f"{name}/")]
    assert len(places) == 4 and all(sampled[f"{name}/{place}"] == plain[f"{name}/{place}"] for place in places)
    assert all(sampled[f"refined/{place}"] != plain[f"{name}/{place}"] for place in places)
    refining = [event for event in heard if event.what == "refining rex for the prompts of refined"]
    assert [(event.done, event.total) for event in refining] == [(n, 4) for n in (1, 2, 3, 4)]  # 2 prompts, 2 steps
    assert all(event.metrics["loss"] > 0 for event in refining)
    assert {event.what for event in heard} >= {"sampling rex by refined", "sampling rex by textual_inversion"}
    assert steps.sample_grid(store, concept, name).skipped


def test_samples_of_the_users_own_prompt_can_be_refined_too(store: Store):
    store = with_refinement(store)
    prompt, sampled = ["<rex> in the desert"], []
    for variant in ("textual_inversion", "refined"):
        report = steps.sample_prompts(store, "rex", "textual_inversion", prompt, 1, variant)
        sampled += [np.asarray(Image.open(path)) for path in report.images.values()]
        assert steps.sample_prompts(store, "rex", "textual_inversion", prompt, 1, variant).skipped
    assert (sampled[0] != sampled[1]).any()


def test_only_grids_with_test_time_optimization_depend_on_its_source_and_on_the_concept_images(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    store = with_refinement(store)
    steps.sample_grid(store, "rex", "textual_inversion")
    plain_hash, changed = sampling_stamps.sources_hash, "sampling/test_time_optimization"
    with monkeypatch.context() as edited:
        edited.setattr(
            sampling_stamps,
            "sources_hash",
            lambda m: plain_hash(m) + "edited" * (changed in m),
        )
        assert steps.sample_grid(store, "rex", "dreambooth").skipped
        assert not steps.sample_grid(store, "rex", "textual_inversion").skipped
    assert not steps.sample_grid(store, "rex", "textual_inversion").skipped  # the source is what it was
    Image.new("RGB", (20, 20), "red").save(store.concept_folder("rex") / "0.png")
    assert steps.sample_grid(store, "rex", "dreambooth").skipped  # its artifact is older, and not trained again here
    assert not steps.sample_grid(store, "rex", "textual_inversion").skipped


def test_a_strategy_that_does_not_apply_is_refused_before_anything_is_trained(store: Store):
    store = changed(store, lambda values: values["variants"].update(dreambooth={"x": {"lag": True}}))
    with pytest.raises(InputError, match="variants.dreambooth.x: lag .* does not apply to dreambooth"):
        steps.check_inputs(store, ["rex"], ["textual_inversion", "dreambooth"])


@pytest.mark.parametrize(
    ("method", "recipe", "said"),
    [
        ("oft", {"r": 7}, "oft cannot be trained on 'cup': 7 blocks do not divide a layer"),
        ("custom_diffusion", {"initial_word": "stuffed animal"}, "'stuffed animal' is .* tokens for this base model"),
        ("textual_inversion", {"templates": "no_such"}, "there is no prompt list 'no_such'"),
    ],
)
def test_a_recipe_that_this_base_model_cannot_have_is_refused_before_anything_is_trained(
    method, recipe, said, store: Store
):
    def change(values):
        values["methods"] = {"dreambooth": {values["base_model"]: {"steps": 1}}, method: {values["base_model"]: recipe}}

    load_base(store)  # loaded, for all that torch draws then
    before, state = bytes_under(store.data), torch.random.get_rng_state()
    store = changed(store, change)
    with pytest.raises(InputError, match=said):
        steps.check_inputs(store, ["cup", "rex"], ["dreambooth", method])
    assert bytes_under(store.data) == before and torch.equal(torch.random.get_rng_state(), state)


def test_every_class_noun_is_placed_before_the_first_concept_is_trained(store: Store):
    folder = store.concept_folder("rex")
    (folder / "concept.yaml").write_text(f'placeholder: "<rex>"\nclass_noun: {"very-" * 19}dog\n')
    with pytest.raises(InputError, match="shorten it"):
        steps.check_inputs(store, ["cup", "rex"], ["textual_inversion"])


def test_the_base_model_is_not_loaded_to_check_what_is_there_already(store: Store, monkeypatch):
    def load(*arguments):
        raise AssertionError("there is nothing to train")

    monkeypatch.setattr(input_checks, "base_for_a_moment", load)
    steps.check_inputs(store, ["cup", "rex"], METHODS)
    with pytest.raises(AssertionError):
        steps.check_inputs(store, ["cup", "rex"], [*METHODS, "personalized_residuals@kv"])


def test_methods_are_made_for_a_check_one_at_a_time_and_once_for_each_class_noun(store: Store, monkeypatch, tmp_path):
    import weakref

    from personalize_core.concepts import concept_files
    from personalize_core.methods.oft.method import OFT

    tiny_workspace.paint_concept_images(tmp_path / "photos" / "max", count=2, seed=9)
    concept_files.add_concept(store.concepts, tmp_path / "photos" / "max", "dog")
    made, at_once, start = [], [], OFT.__init__

    def watched(self, config, base, concept):
        at_once.append(sum(other() is not None for other in made))
        made.append(weakref.ref(self))
        start(self, config, base, concept)

    monkeypatch.setattr(OFT, "__init__", watched)
    steps.check_inputs(store, ["cup", "max", "rex"], ["oft", "oft@coft"])
    assert at_once == [0, 0, 0, 0]  # 2 methods, 2 class nouns


def test_a_reference_that_a_concept_lacks_is_refused_before_anything_is_trained(store: Store):
    def change(values):
        values["methods"]["vico"] = {}
        values["variants"]["vico"] = {"first": {}, "third": {"reference": 2}}

    store = changed(store, change)
    steps.check_inputs(store, ["rex"], ["vico"])
    (store.concept_folder("rex") / "2.png").unlink()
    with pytest.raises(InputError, match=r"variants\.vico\.third: it takes 3 concept images, and 'rex' has 2"):
        steps.check_inputs(store, ["cup", "rex"], ["dreambooth", "vico"])


def test_training_that_fails_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch):
    from personalize_core.training import training_log

    def full_disk(*arguments):
        raise OSError("no space left on device")

    before = bytes_under(store.artifact("textual_inversion", "rex"))
    base = store.params.base_model
    store = changed(store, lambda values: values["methods"]["textual_inversion"][base].update(lr=0.2))
    monkeypatch.setattr(training_log, "write", full_disk)
    with pytest.raises(OSError, match="no space"):
        steps.train(store, "rex", "textual_inversion")
    assert bytes_under(store.artifact("textual_inversion", "rex")) == before
    assert [path.name for path in store.artifact("textual_inversion", "rex").parent.iterdir()] == ["cup", "rex"]


@pytest.mark.parametrize(
    "call",
    [
        lambda store: steps.sample_grid(store, "new", "dreambooth"),
        lambda store: steps.score(store, "new", "dreambooth"),
        lambda store: steps.sample_prompts(store, "new", "dreambooth", ["<new>"], 1),
        lambda store: steps.export(store, "new", "dreambooth", store.root / "out"),
    ],
    ids=["sample grid", "score", "sample", "export"],
)
def test_what_was_not_trained_cannot_be_used(call, store: Store, tmp_path: Path):
    tiny_workspace.paint_concept_images(tmp_path / "photos" / "new", count=2, seed=3)
    from personalize_core.concepts import concept_files

    concept_files.add_concept(store.concepts, tmp_path / "photos" / "new", "dog")
    with pytest.raises(InputError, match="; run `personalize"):
        call(store)
    assert not (store.root / "out").exists()


# Results whose files are other bytes of the same size


def with_a_byte_changed(path: Path) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[:-20] + bytes([before[-20] ^ 1]) + before[-19:])
    return before


def test_weights_that_were_changed_are_neither_sampled_nor_certified_and_trained_again(store: Store):
    weights = store.artifact("dreambooth", "rex") / "weights.safetensors"
    before = with_a_byte_changed(weights)
    (cell,) = steps.plan(store, ["rex"], ["dreambooth"])
    assert (cell.first, cell.why) == ("train", "changed since it was made, or gone: weights.safetensors")
    with pytest.raises(InputError, match=r"weights.safetensors changed since .*; run .*train rex -m dreambooth"):
        steps.sample_grid(store, "rex", "dreambooth")
    assert made_again(store) == {"artifacts/dreambooth/rex"}
    assert weights.read_bytes() == before and not steps.plan(store)


def test_an_image_that_was_changed_is_sampled_again_whatever_was_scored(store: Store):
    image = next((store.grid("dreambooth", "rex") / "dreambooth").glob("*.png"))
    before = with_a_byte_changed(image)
    with pytest.raises(InputError, match=f"{image.name} changed since .*; run .*evaluate rex -m dreambooth"):
        steps.score(store, "rex", "dreambooth")
    assert made_again(store) == {"grids/dreambooth/rex"}
    assert image.read_bytes() == before and not steps.plan(store)


def test_changed_weights_that_were_imported_are_refused_with_a_way_out(store: Store, tmp_path: Path):
    steps.export(store, "rex", "dreambooth", tmp_path / "exported")
    shutil.rmtree(folder := store.artifact("dreambooth", "rex"))
    steps.import_artifact(store, "rex", "dreambooth", tmp_path / "exported")
    with_a_byte_changed(folder / "weights.safetensors")
    with pytest.raises(InputError, match="and import it again") as refused:
        steps.train(store, "rex", "dreambooth")
    assert str(folder) in str(refused.value)
    shutil.rmtree(folder)
    steps.import_artifact(store, "rex", "dreambooth", tmp_path / "exported")
    assert steps.train(store, "rex", "dreambooth").skipped
