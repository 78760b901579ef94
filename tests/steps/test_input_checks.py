"""Everything that can be known before training is checked before it, at once, whichever way a run is started."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from personalize_core import steps
from personalize_core.base_model.loading import load_base_model
from personalize_core.cli import main as command_line
from personalize_core.errors import InputError
from personalize_core.files.atomic import machine
from personalize_core.steps import estimating
from personalize_core.workspace import recipes
from personalize_core.workspace.store import OWN_DEVICE, Store
from pipelines.assets import chain
from pipelines.partitions import CONCEPT
from tests import tiny_workspace
from tests.every_method.cases import ALL, Case
from tests.every_method.cases import CONCEPT as OF_CASES
from tests.in_dagster import materialize

LONG = "a photo of a {} " + "by a very red mug " * 30


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts, nothing trained."""
    return tiny_workspace.make(tmp_path_factory.mktemp("workspace")).root


@pytest.fixture
def store(workspace: Path, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(workspace, tmp_path)


def changed(store: Store, change) -> Store:
    values = tiny_workspace.params(Path(store.params.base_model).parents[1])
    change(values)
    return tiny_workspace.write_params(store.root, values)


def with_a_long_prompt(store: Store) -> Store:
    (store.data / "prompts" / "long.txt").write_text(f"a {{}}\n{LONG}\n")
    return changed(store, lambda values: values["sampling"].update(prompts="long"))


def said(problems: list[InputError]) -> str:
    return "\n".join(map(str, problems))


def test_a_workspace_as_it_comes_has_no_problem(store: Store):
    assert steps.problems_of_workspace(store) == []
    assert not (store.data / "artifacts").exists() and not (store.data / "latents").exists()


def test_all_that_is_wrong_is_found_at_once(store: Store):
    def change(values):
        values["encoders"] |= {"text_image": ["clip-b16"], "segmenter": "sam"}
        values["methods"]["oft"] = {values["base_model"]: {"r": 7}}
        values["methods"]["xti"] = {values["base_model"]: {"lr": -1.0}}
        values["sampling"]["prompts"] = "long"
        values["variants"]["dreambooth"] = {"x": {"lag": True}}

    store = changed(with_a_long_prompt(store), change)
    (store.concepts / "rex" / "0.png").write_bytes(b"no image")
    shutil.copytree(store.concepts / "cup", store.concepts / "bare", ignore=shutil.ignore_patterns("concept.yaml"))
    (store.data / "protocols").mkdir()
    (store.data / "protocols" / "bad.yaml").write_text("title: only\n")
    found = steps.problems_of_workspace(store)
    for sentence in (
        "there is no encoder 'clip-b16'",
        "there is no segmenter 'sam'",
        "oft cannot be trained on 'cup': 7 blocks",
        "lr = -1.0",
        "variants.dreambooth.x: lag",
        "0.png cannot be read as an image",
        "bare holds no concept.yaml",
        "bad.yaml: the key 'sampler' is missing",
        "prompt 2 of the list 'long': the prompt has",
    ):
        assert said(found).count(sentence) == 1, sentence
    assert len(found) == 9


def test_params_yaml_that_cannot_be_read_hides_no_problem_of_a_concept(store: Store):
    (store.root / "params.yaml").write_text("seed: [")
    (store.concepts / "rex" / "0.png").write_bytes(b"no image")
    found = said(steps.problems_of_workspace(Store(store.root)))
    assert "params.yaml" in found and "0.png cannot be read as an image" in found


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("text_image", ["clip-b32:/nowhere/weights.safetensors"], "there is no /nowhere/weights.safetensors"),
        ("text_image", ["clip-b32:" + "x" * 300], "File name too long"),
        ("text_image", ["x" * 300], "File name too long"),
        ("identity", ["mini-clip"], "there is no encoder 'mini-clip': known are mini-identity, dino-s16"),
        ("segmenter", "mini-clip", "there is no segmenter 'mini-clip': known are mini-segmenter and clipseg"),
    ],
)
def test_an_encoder_that_is_not_there_is_refused_without_loading_one(kind, name, sentence, store: Store):
    store = changed(store, lambda values: values["encoders"].update({kind: name}))
    assert sentence in said(steps.problems_of(store, [], []))


def run_command(store: Store, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(store.root), *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    "command",
    [("check",), ("run",), ("train", "rex"), ("step", "train", "--method", "textual_inversion")],
    ids=["check", "run", "train", "DVC's stage"],
)
def test_a_prompt_that_is_too_long_is_refused_before_training_by_every_command(
    command, store: Store, monkeypatch, capsys
):
    store = with_a_long_prompt(store)
    assert run_command(store, monkeypatch, *command) == 2
    assert "prompt 2 of the list 'long': the prompt has" in capsys.readouterr().err
    assert not (store.data / "artifacts").exists() and not (store.data / "latents").exists()


def test_a_prompt_that_is_too_long_is_refused_before_training_in_dagster(store: Store):
    store = with_a_long_prompt(store)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(CONCEPT, ["rex"])
        partition = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})
        with pytest.raises(Exception, match="prompt 2 of the list 'long'"):
            materialize(instance, store.root, [chain.artifact], partition)
    assert not (store.data / "artifacts").exists() and not (store.data / "latents").exists()


def test_what_is_wrong_with_one_concept_does_not_stop_dvcs_stage_for_others(store: Store, monkeypatch, capsys):
    (store.concepts / "rex" / "concept.yaml").write_text(f'placeholder: "<rex>"\nclass_noun: {"very-" * 19}dog\n')
    assert run_command(store, monkeypatch, "step", "train", "--method", "base_model") == 2
    assert "rex: " in capsys.readouterr().err
    assert store.artifact("base_model", "cup").is_dir() and not store.artifact("base_model", "rex").exists()


def test_check_says_what_is_to_do(store: Store, monkeypatch, capsys):
    assert run_command(store, monkeypatch, "check") == 0
    printed = " ".join(capsys.readouterr().out.split())
    # 2 concepts x 4 methods, of which the base model learns nothing; of each 2 prompts x 2 images, of the residuals
    # with and without LAG; 2 class images of 2 nouns
    assert "Nothing is wrong. To do: 6 trainings and 44 images: about" in printed


# -- how long it takes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_recipe_knows_how_many_steps_its_stages_take(case: Case):
    method = case.make(case.base(), OF_CASES)
    assert method.config.training_steps == sum(stage.steps for stage in method.stages())


def test_without_records_the_estimate_is_by_rules_of_thumb(store: Store):
    found = steps.estimate(store, steps.plan(store, ["rex"], ["textual_inversion"]))
    assert (found.trainings, found.images, found.measured) == (1, 4, False)
    assert found.seconds == pytest.approx(3 / 5 + 4 * 2.0) and found.bytes == 4 * 0.5e6


def test_the_base_model_alone_is_sampled_and_not_trained(store: Store):
    found = steps.estimate(store, steps.plan(store, ["rex"], ["base_model", "textual_inversion"]))
    assert (found.trainings, found.images) == (1, 2 * 4)
    assert steps.estimate(store, steps.plan(store, ["rex"], ["base_model"])).trainings == 0


def test_it_goes_by_what_was_recorded_here(store: Store):
    """A step of 0.25 s and an image of 3 s, recorded for one concept, make the other's 12 steps and 4 images 15 s."""
    short = changed(store, lambda values: values["methods"]["textual_inversion"][values["base_model"]].update(steps=3))
    steps.train(short, "cup", "textual_inversion")
    costs = short.training_costs("textual_inversion", "cup")
    costs.write_text(json.dumps(json.loads(costs.read_text()) | {"training_seconds": 0.75}))
    sampling = short.sampling_costs("textual_inversion", "cup")
    sampling.parent.mkdir(parents=True, exist_ok=True)
    sampling.write_text(json.dumps({"seconds_per_image": {"textual_inversion": 3.0}}))
    longer = changed(
        store, lambda values: values["methods"]["textual_inversion"][values["base_model"]].update(steps=12)
    )
    found = steps.estimate(longer, steps.plan(longer, ["rex"], ["textual_inversion"]))
    assert found.measured and found.seconds == pytest.approx(12 * 0.25 + 4 * 3.0)
    weights = longer.artifact("textual_inversion", "cup") / "weights.safetensors"
    assert found.bytes == weights.stat().st_size + 4 * 0.5e6


@pytest.mark.parametrize(("count", "announced"), [(400_000, False), (440_000, True)])  # 80,000 s and 88,000 s
def test_work_of_more_than_a_day_is_announced(count, announced, store: Store):
    store = changed(
        store, lambda values: values["methods"]["textual_inversion"][values["base_model"]].update(steps=count)
    )
    notice = steps.long_work_notice(store, steps.plan(store, ["rex"], ["textual_inversion"]))
    assert bool(notice) == announced
    if notice:
        assert "1 training and 4 images: about" in notice and "24 hours" in notice


@pytest.mark.parametrize(
    ("device", "base_model", "measured", "said"),
    [
        ("cuda", "sd-1.4", False, "about 55 minutes on one device and 22 MB on disk, by rules of thumb for one fast"),
        ("cuda", "sd-1.4", True, "about 55 minutes on one device and 22 MB on disk, by earlier runs here"),
        ("cpu", "sd-1.4", True, "about 55 minutes on one device and 22 MB on disk, by earlier runs here"),
        ("cpu", "mini", True, "about 55 minutes on one device and 22 MB on disk, by earlier runs here"),
        ("cpu", "sd-1.4", False, "about 22 MB on disk; .* done here, and longer than the 55 minutes on one fast graph"),
        ("cpu", "mini", False, "about 22 MB on disk; how long they take on a CPU is known once some are done here$"),
    ],
)
def test_a_graphics_cards_times_are_not_said_of_a_cpu(device, base_model, measured, said, monkeypatch):
    monkeypatch.setattr(estimating, "device_of", lambda store: device)
    store: Any = SimpleNamespace(params=SimpleNamespace(base_model=base_model))
    words = estimating.Estimate(8, 44, 3300.0, 22e6, measured).in_words(store)
    assert re.fullmatch(f"8 trainings and 44 images: {said}.*", words)


@pytest.mark.parametrize(("device", "alone"), [("cuda", True), ("cpu", False)])
def test_only_a_graphics_card_is_kept_from_others_while_a_base_model_is_looked_at(device, alone, store, monkeypatch):
    """Two base models may not fit on a card; who checks a workspace on a CPU need not wait for a training."""
    monkeypatch.delenv(OWN_DEVICE, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    under_way = []

    def load(store: Store):
        under_way.append(store.is_under_way("device", machine(), ""))
        return load_base_model(store.params.base_model, "cpu", "fp32")

    monkeypatch.setattr(recipes, "device_of", lambda store: device)
    monkeypatch.setattr(recipes, "load_base", load)
    assert steps.problems_of_workspace(store) == []
    assert under_way == [alone]
    assert not store.is_under_way("device", machine(), "")
