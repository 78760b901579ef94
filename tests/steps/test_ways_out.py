"""What a message advises lets whoever follows it go on: the command that it names is run, then the same call again."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from personalize_core import steps
from personalize_core.artifacts.description import CONFIG
from personalize_core.cli.main import app
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, read_result
from personalize_core.workspace import commands
from personalize_core.workspace.store import REFERENCES, SCORES, Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

UNLISTED = "base_model"  # which params.yaml does not name here; it takes no time to train
LISTED = "personalized_residuals"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    store = tiny_workspace.finished(root, ["rex"], [LISTED])
    steps.compare(store)
    return root


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished, tmp_path)


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def first_image(store: Store) -> Path:
    return min((store.grid(LISTED, "rex") / LISTED).glob("*.png"))


def made_by(store: Store, call: Callable[[Store], Any]) -> list[str]:
    """Follow what messages advise until the call passes; the commands that were run."""
    run, asked = [], lambda: call(store)
    for _ in range(5):
        try:
            asked()
            return run
        except InputError as error:
            said: BaseException = error
        while isinstance(said, InputError):  # a command may say that another comes before it
            (command, *_) = re.findall(r"`personalize ([^`]+)`", str(said))
            run.append(command)
            assert len(run) < 5, run
            done = CliRunner().invoke(app, ["--root", str(store.root), *shlex.split(command)])
            assert done.exit_code == 0 or isinstance(done.exception, InputError), done.output
            said = done.exception or SystemExit(0)
    raise AssertionError(run)


@pytest.mark.parametrize(
    ("spoil", "call", "run"),
    [
        (
            lambda store: None,
            lambda store: steps.sample_grid(store, "rex", UNLISTED),
            [f"train rex -m {UNLISTED}"],
        ),
        (
            lambda store: None,
            lambda store: steps.sample_prompts(store, "rex", UNLISTED, ["a <rex>"], 1),
            [f"train rex -m {UNLISTED}"],
        ),
        (
            lambda store: None,
            lambda store: steps.score(store, "rex", UNLISTED),
            [f"run rex -m {UNLISTED}"],
        ),
        (
            lambda store: changed(store.artifact(LISTED, "rex") / "weights.safetensors"),
            lambda store: steps.sample_prompts(store, "rex", LISTED, ["a <rex>"], 1),
            [f"train rex -m {LISTED}"],
        ),
        (
            lambda store: changed(first_image(store)),
            lambda store: steps.score(store, "rex", LISTED),
            [f"evaluate rex -m {LISTED}"],
        ),
        (
            lambda store: changed(store.scores(LISTED, "rex") / SCORES),
            steps.compare,
            [f"evaluate rex -m {LISTED}"],
        ),
        (
            lambda store: changed(store.scores(REFERENCES, "rex") / SCORES),
            steps.compare,
            ["step score-references"],
        ),
        (
            lambda store: changed(store.comparison() / "summary.json"),
            steps.report,
            ["compare"],
        ),
    ],
)
def test_the_command_that_a_message_names_makes_what_was_missing_or_changed(store, spoil, call, run):
    spoil(store)
    assert made_by(store, call) == run


def test_of_several_concepts_the_one_that_was_not_trained_is_named_with_its_method(store):
    tiny_workspace.paint_concept_images(store.root / "more", count=2, seed=3)
    from personalize_core.concepts import concept_files

    concept_files.add_concept(store.concepts, store.root / "more", "red mug", "cup")
    cells = [("rex", LISTED), ("cup", LISTED)]
    run = made_by(store, lambda store: steps.sample_several_concepts(store, cells, ["<rex> and <cup>"], 1))
    assert run == [f"train cup -m {LISTED}"]


@pytest.mark.parametrize("damaged", ["weights.safetensors", CONFIG, MANIFEST])
def test_what_was_imported_and_is_damaged_is_to_be_imported_again_and_never_trained_over(store, damaged, tmp_path):
    steps.export(store, "rex", LISTED, tmp_path / "exported")
    shutil.rmtree(folder := store.artifact(LISTED, "rex"))
    steps.import_artifact(store, "rex", LISTED, tmp_path / "exported")
    (folder / damaged).write_bytes(b"{")
    for call in (steps.train, steps.sample_grid):
        with pytest.raises(InputError, match=f"(remove {folder}|remove the folder) and import( it)? again"):
            call(store, "rex", LISTED)
    (cell,) = steps.plan(store)
    assert cell.first == "cannot" and "and import" in cell.why
    assert "import rex exported" in steps.explain(store, folder).again
    shutil.rmtree(folder)
    steps.import_artifact(store, "rex", LISTED, tmp_path / "exported")
    assert steps.train(store, "rex", LISTED).skipped and not steps.sample_grid(store, "rex", LISTED).skipped


def test_a_result_that_cannot_be_read_is_made_again_as_explain_says(store):
    path = store.comparison() / "summary.json"
    path.write_text("{")
    with pytest.raises(InputError, match=f"`personalize explain {path.parent}` says how to make it again"):
        read_result(path, missing=list)
    remove, _, make = steps.explain(store, path.parent).again.partition(" && ")
    assert (remove, make) == ("rm -r data/comparison", "personalize compare")


def test_a_training_with_another_seed_and_images_from_elsewhere_have_commands_of_their_own(store):
    assert commands.scores(store.again(2), "rex", LISTED) == f"personalize repeat rex -m {LISTED} --times 2"
    assert commands.grid(store, "rex", "flux") == "personalize score FOLDER --concept rex --as flux"
    store.external("flux", "rex").parent.mkdir(parents=True)
    store.external("flux", "rex").write_text("folder: images\n")
    assert commands.grid(store, "rex", "flux") == "personalize score"
    assert commands.scores(Store(store.root, "quick"), "rex", "flux") == "personalize --protocol quick score"
