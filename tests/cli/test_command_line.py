"""The command line: what the commands print, and that wrong input ends in one sentence and changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize_core import steps
from personalize_core.cli import running, terminal
from personalize_core.concepts import concept_files
from personalize_core.workspace.recipes import prompts_of
from personalize_core.workspace.store import Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts, nothing trained."""
    return tiny_workspace.make(tmp_path_factory.mktemp("workspace")).root


@pytest.fixture
def personalize(workspace: Path, personalize_in):
    return personalize_in(workspace)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if ".work" not in path.parts}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "max"
    tiny_workspace.paint_concept_images(folder, count=2, seed=4)
    return folder


def empty_file(photos: Path) -> None:
    (photos / "0.png").write_bytes(b"")


def text_called_jpg(photos: Path) -> None:
    (photos / "a.jpg").write_text("not an image")


def half_an_image(photos: Path) -> None:
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[: len(whole) // 2])


def no_images(photos: Path) -> None:
    for path in photos.iterdir():
        path.unlink()


def raw_concept_image(photos: Path) -> None:
    (photos / "b.heic").write_bytes(b"ftypheic")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty_file, "0.png is empty"),
        (text_called_jpg, "a.jpg cannot be read as an image"),
        (half_an_image, "0.png cannot be read as an image"),
        (no_images, "holds no concept images"),
        (raw_concept_image, "b.heic"),
    ],
)
def test_a_folder_with_something_wrong_is_refused_whole(spoil, said, photos, workspace, personalize):
    spoil(photos)
    before, given = files(workspace), files(photos)
    status, _, complaint = personalize("add", str(photos), "--class-noun", "dog")
    assert status == 2 and said in complaint and complaint.count("\n") == 1
    assert files(workspace) == before and files(photos) == given


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "PHOTOS", "--class-noun", "dog", "--name", "My Dog!"], "'My Dog!' cannot be a concept's name"),
        (["add", "PHOTOS", "--class-noun", "42"], "'42' cannot be a class noun"),
        (["add", "PHOTOS", "--class-noun", "dog", "--name", "rex"], "'rex' exists already"),
        (["add", "NOWHERE", "--class-noun", "dog"], "is no folder"),
        (["run", "fido"], "there is no concept 'fido'"),
        (["run", "-m", "hypernetwork"], "there is no method 'hypernetwork'; the methods are"),
        (["train", "../rex"], "'../rex' cannot be a concept's name"),
        (["--protocol", "nobody", "run"], "there is no protocol 'nobody'"),
        (["repeat", "rex", "-m", "base_model"], "base_model learns nothing"),
        (["sample", "rex", "-m", "dreambooth", "--prompt", "a photo of a dog"], "Write '<rex>'"),
        (["sample", "rex", "-m", "dreambooth", "--prompt", "<rex>"], "has not been trained"),
        (["heat-maps", "rex", "-m", "dreambooth", "--prompt", "a dog"], "Write '<rex>'"),
        (["compose", "rex:oft", "cup:", "--prompt", "<rex> by <cup>"], "there is no method ''"),
        (["analyse"], "there are no image grids to analyse yet"),
        (["analyse", "fido"], "there is no concept 'fido'"),
        (["analyse", "rex", "-m", "dreambooth"], "dreambooth has not been trained on 'rex'"),
        (["suggest-class", "rex", "--nouns", "nowhere"], "there is no list of nouns 'nowhere'"),
        (["compare"], "nothing has been scored"),
        (["report"], "nothing has been scored"),
        (["step", "report"], "nothing has been compared"),
        (["--root", "NOWHERE", "run"], "does not exist"),
    ],
)
def test_a_mistake_ends_at_once_with_one_sentence(arguments, said, photos, workspace, personalize):
    before = files(workspace)
    arguments = [word.replace("PHOTOS", str(photos)).replace("NOWHERE", str(photos / "nowhere")) for word in arguments]
    status, _, complaint = personalize(*arguments)
    assert status == 2
    assert said in complaint and complaint.startswith("personalize: ") and complaint.count("\n") == 1
    assert files(workspace) == before


def spoiled_key(values: dict) -> None:
    values["methods"]["dreambooth"][values["base_model"]]["learning_rate"] = 1


def spoiled_value(values: dict) -> None:
    values["sampling"]["steps"] = 0


def spoiled_base_model(values: dict) -> None:
    values["base_model"] = "sd-99"


def spoiled_variant(values: dict) -> None:
    values["variants"]["personalized_residuals"]["x"] = {"lag": "perhaps"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoiled_key, "there is no key 'learning_rate'; known are"),
        (spoiled_value, "sampling.steps = 0"),
        (spoiled_base_model, "there is no base model 'sd-99'"),
        (spoiled_variant, "lag = 'perhaps'"),
    ],
)
def test_what_is_wrong_in_params_is_said_before_anything_is_computed(spoil, said, workspace, personalize):
    values = tiny_workspace.params(workspace)
    spoil(values)
    tiny_workspace.write_params(workspace, values)
    try:
        before = files(workspace)
        status, _, complaint = personalize("run")
        assert status == 2 and said in complaint and complaint.count("\n") == 1
        assert files(workspace) == before
    finally:
        tiny_workspace.write_params(workspace, tiny_workspace.params(workspace))


def test_a_class_noun_that_the_tokenizer_cannot_place_is_refused_before_training(workspace, personalize, photos):
    """The tiny tokenizer has no letter outside ASCII's; here it is a noun that swallows the prompt."""
    noun = "very-" * 19 + "dog"
    assert personalize("add", str(photos), "--class-noun", noun, "--name", "odd")[0] == 0
    try:
        status, _, complaint = personalize("train", "odd", "-m", "base_model")
        assert status == 2 and "shorten it" in complaint
        assert not Store(workspace).artifact("base_model", "odd").exists()
    finally:
        shutil.rmtree(workspace / "data" / "concepts" / "odd")


def test_added_concept_images_are_copied_byte_for_byte(workspace, personalize, photos):
    status, printed, _ = personalize("add", str(photos), "--class-noun", "dog", "--name", "copied")
    folder = workspace / "data" / "concepts" / "copied"
    try:
        assert status == 0 and "<copied>" in printed
        for path in photos.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert concept_files.read_concept(folder).placeholder == "<copied>"
    finally:
        shutil.rmtree(folder)


def test_what_is_most_likely_a_mistake_is_added_and_said_by_add_and_by_check(workspace, personalize, photos):
    shutil.copy(photos / "0.png", photos / "again.png")
    (photos / "masks").mkdir()
    for path in photos.glob("*.png"):
        with Image.open(path) as image:
            Image.new("L", image.size, 255 * (path.name != "1.png")).save(photos / "masks" / path.name)
    status, printed, _ = personalize("add", str(photos), "--class-noun", "dog", "--name", "doubtful")
    try:
        assert status == 0
        doubts = ["0.png and again.png are the same image", "the mask of 1.png is black all over"]
        assert all(f"Worth a look: {doubt}" in printed for doubt in doubts)
        status, printed, _ = personalize("check", "doubtful", "-m", "base_model")
        assert status == 0 and all(f"Worth a look, of doubtful: {doubt}" in printed for doubt in doubts)
    finally:
        shutil.rmtree(workspace / "data" / "concepts" / "doubtful")


def test_what_add_leaves_out_and_takes_from_kohyas_folder_name_is_printed_once(workspace, personalize, photos):
    folder = photos.rename(photos.with_name("10_sks dog"))
    captions = [f"{number}.txt" for number in range(8)]
    for name in ("Thumbs.db", ".DS_Store", *captions):
        (folder / name).write_text("a photo of sks dog")
    status, printed, _ = personalize("add", str(folder))
    try:
        assert status == 0 and "Added sks, class noun dog. In prompts, write <sks> for it." in printed
        assert printed.count("10 repeats") == 1
        assert "Left out, as they are no concept images: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more.\n" in printed
        assert "DS_Store" not in printed
    finally:
        shutil.rmtree(workspace / "data" / "concepts" / "sks")


def test_without_a_class_noun_add_says_which_option_gives_it(workspace, personalize, photos):
    before = files(workspace)
    status, _, complaint = personalize("add", str(photos))
    assert status == 2 and "--class-noun dog" in complaint and files(workspace) == before


def test_brackets_in_names_of_files_are_printed_as_they_are(workspace, personalize, photos):
    """Rich would take "[bold]" for markup and print nothing in its place."""
    (photos / "0.png").rename(photos / "[bold]0.png")
    status, printed, _ = personalize("add", str(photos), "--class-noun", "dog", "--name", "brackets")
    try:
        assert status == 0 and printed.count("[bold]0.png") == 2  # the image's name, and its path
    finally:
        shutil.rmtree(workspace / "data" / "concepts" / "brackets")
    status, _, complaint = personalize("add", str(photos / "[bold]nowhere"), "--class-noun", "dog")
    assert status == 2 and "[bold]nowhere" in complaint


def test_every_line_that_is_printed_keeps_its_brackets(capsys):
    with terminal.progress() as listener:
        listener(steps.Event("[bold]training", 1, 1))
    terminal.print_line("[bold]line")
    terminal.print_table(["[bold]Name", "Path"], [["[bold]rex", "[bold]path"]])
    printed = capsys.readouterr().out
    for word in ("training", "line", "Name", "rex", "path"):
        assert f"[bold]{word}" in printed


def test_help_loads_no_library_but_typer():
    check = "import sys, personalize_core.cli.main; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "typer" in run.stdout.split()
    assert not {"torch", "numpy", "rich", "polars", "matplotlib", "pydantic", "PIL"} & set(run.stdout.split())


def test_loading_weights_prints_nothing_into_our_bars():
    load = (
        "from personalize_core.base_model.loading import load_base_model as load; load('mini', 'cpu');"
        "from personalize_core.metrics.encoders import load_identity_encoder as load; load('mini-identity')"
    )
    run = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert run.stdout == "" and "Loading weights" not in run.stderr


@pytest.mark.parametrize("command", [[], ["step"]])
def test_the_help_of_no_command_is_cut_off(command, personalize):
    assert "..." not in personalize(*command, "--help")[1].partition("Commands:")[2]


def test_a_run_prints_the_path_of_every_image_that_it_made(workspace, personalize):
    status, printed, _ = personalize("run", "rex", "-m", "base_model", "-m", "personalized_residuals")
    assert status == 0
    images = {word for word in printed.split() if word.endswith(".png")}
    assert {Path(path).name for path in images} >= {"grid.png", "loss.png", "grid_rex.png", "identity_vs_text.png"}
    for path in images:
        Image.open(path).close()  # cut off or missing, it would raise
    assert "done in" in printed and "DINO over the base model" in printed
    page = next(Path(word) for word in printed.split() if word.endswith("report.html"))
    assert "Personalized Residuals with LAG" in page.read_text()

    again = personalize("run", "rex", "-m", "base_model", "-m", "personalized_residuals")[1]
    assert "done in" not in again and "up to date" in again


def test_samples_are_listed_with_their_paths(workspace, personalize):
    assert personalize("train", "rex", "-m", "base_model")[0] == 0
    status, printed, _ = personalize(
        "sample", "rex", "-m", "base_model", "--prompt", "<rex> in the desert", "--images", "2"
    )
    images = [word for word in printed.split() if word.endswith(".png")]
    assert status == 0 and len(images) == 2 and all(Path(path).is_file() for path in images)


def test_concepts_in_one_image_may_be_learned_by_methods_of_their_own(workspace, personalize, monkeypatch):
    asked = []

    def sample_several_concepts(store, cells, prompts, images, listener):
        asked.append(cells)
        names = [concept for concept, _ in cells]
        metrics = {f"{part}.{name}": 0.5 for part in names for name in names}
        return steps.Report("stamp", False, 1.0, workspace, metrics)

    monkeypatch.setattr(steps, "sample_several_concepts", sample_several_concepts)
    both = ["--prompt", "<rex> next to <cup>"]
    assert personalize("compose", "rex", "cup", *both)[0] == 0
    assert personalize("compose", "rex:oft@coft", "cup", *both, "-m", "lora_dreambooth")[0] == 0
    status, printed, _ = personalize("compose", "rex:oft", "cup:personalized_residuals", *both)
    assert status == 0 and "with rex" in printed and "0.500" in printed
    assert asked == [
        [("rex", "personalized_residuals"), ("cup", "personalized_residuals")],
        [("rex", "oft@coft"), ("cup", "lora_dreambooth")],
        [("rex", "oft"), ("cup", "personalized_residuals")],
    ]


def test_a_way_between_two_concepts_is_asked_for_with_their_methods(workspace, personalize, monkeypatch):
    asked = []

    def sample_between(store, cells, prompts, points, images, listener):
        asked.append((cells, points, images))
        metrics = {f"{share}.{name}": 0.25 for share in ("0.5", "1.0") for name in ("rex", "cup")}
        return steps.Report("stamp", False, 1.0, workspace, metrics)

    monkeypatch.setattr(steps, "sample_between", sample_between)
    way = ["rex", "cup:textual_inversion", "--prompt", "a <rex>", "--points", "5"]
    status, printed, _ = personalize("interpolate", *way)
    assert status == 0 and "with cup" in printed and printed.count("0.250") == 4
    assert asked == [((("rex", "dti"), ("cup", "textual_inversion")), 5, 2)]


def test_one_broken_concept_stops_no_other(workspace, personalize):
    folder = workspace / "data" / "concepts" / "broken"
    folder.mkdir()
    (folder / "concept.yaml").write_text('placeholder: "<broken>"\nclass_noun: dog\n')
    (folder / "0.png").write_text("no image")
    try:
        status, printed, complaint = personalize("step", "encode-images")
        assert status == 2 and "broken: " in complaint and complaint.count("cannot be read") == 1
        latents = [set(Store(workspace).latents(name).glob("*/manifest.json")) for name in ("cup", "rex")]
        assert len(latents[0]) == len(latents[1]) > 1  # a folder for each way that concept images are prepared
    finally:
        shutil.rmtree(folder)


def test_every_base_model_that_is_known_by_name_is_listed_with_its_revision(personalize):
    status, printed, _ = personalize("base-models")
    assert status == 0
    for word in ("mini", "CompVis/stable-diffusion-v1-4", "133a221b8aa7", "sd-2.1-base", "predicts velocity"):
        assert word in printed


def test_the_projects_own_params_and_prompts_are_sound():
    store = Store(REPOSITORY)
    for method in store.params.method_names:
        store.params.config(method)
        assert store.params.sampling_variants(method)
    assert all(prompts_of(store, name).templates for name in store.concept_names())


def test_the_demo_is_of_concepts_that_come_with_the_project():
    store = Store(REPOSITORY)
    for name in running.DEMO:
        assert len(concept_files.concept_images(store.concept_folder(store.concept(name).name))) >= 4


def test_importing_takes_over_an_embedding_and_refuses_a_pickle(workspace, personalize, tmp_path):
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "rex.safetensors")
    (tmp_path / "rex.pt").write_bytes(b"a pickle, for all that is known")
    before = files(workspace)
    status, _, complaint = personalize("import", "rex", str(tmp_path / "rex.pt"), "-m", "textual_inversion")
    assert status == 2 and "rex.pt is a pickle" in complaint and complaint.count("\n") == 1
    assert files(workspace) == before
    status, printed, _ = personalize("import", "rex", str(tmp_path / "rex.safetensors"), "-m", "textual_inversion")
    assert status == 0 and "data/artifacts/textual_inversion/rex" in printed
    assert load_file(workspace / "data/artifacts/textual_inversion/rex/weights.safetensors")["embedding.vector"].all()
    status, printed, _ = personalize("train", "rex", "-m", "textual_inversion")
    assert status == 0 and "up to date" in printed  # kept
    shutil.rmtree(workspace / "data" / "artifacts" / "textual_inversion")  # as the tests before it found it
