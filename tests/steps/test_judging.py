"""A judge in the workspace: off unless it is asked for, kept when it is, and marked as one wherever it is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from PIL import Image

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_results
from personalize_core.metrics import tables
from personalize_core.metrics.judge import chat
from personalize_core.report import evidence as read_evidence
from personalize_core.report import page as report_page
from personalize_core.report import tables as report_tables
from personalize_core.steps import result_checks
from personalize_core.study import page
from personalize_core.study.design import Request as Study
from personalize_core.study.design import design
from personalize_core.workspace.external_columns import ExternalColumn
from personalize_core.workspace.stamps.scoring import score_stamp
from personalize_core.workspace.store import ABSENT, AGREEMENT, REFERENCES, SCORES, Store
from tests import tiny_workspace
from tests.metrics.judge_server import KEY, Reply, Request, serving, verdict
from tests.study import workspace as small

METHODS = ["base_model", "textual_inversion"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_workspace.finished(tmp_path_factory.mktemp("asked"), ["rex"], METHODS)


@pytest.fixture
def store(finished: Store, tmp_path: Path) -> Store:
    return tiny_workspace.copy_of(finished.root, tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving() as running:
        running.reply = answered
        yield running


def answered(number: int, request: Request) -> Reply:
    """A score that depends on what is shown, and on nothing else."""
    return Reply(verdict(int(sum(int(np.asarray(image).sum()) for image in request.images) % 5)))


def asking(store: Store, address: str, **changes) -> Store:
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    judge = {"address": address, "model": "gpt-x", "key_variable": "JUDGE_KEY"}
    return tiny_workspace.write_params(store.root, values | {"judge": judge | changes})


def score_all(store: Store) -> list[steps.Report]:
    reports = [steps.score(store, "rex", method) for method in METHODS]
    return [*reports, steps.score_references(store, "rex")]


def table_of(store: Store, method: str):
    return tables.read(store.scores(method, "rex") / SCORES)


def test_without_the_setting_nothing_is_asked_and_stamps_know_nothing_of_it(store: Store, server):
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    stamps = {method: score_stamp(store, "rex", method) for method in (*METHODS, REFERENCES)}
    assert not any("judge" in stamp.of for stamp in stamps.values())
    null = tiny_workspace.write_params(store.root, values | {"judge": None})
    assert {method: score_stamp(null, "rex", method) for method in stamps} == stamps
    assert all(report.skipped for report in score_all(null))
    assert not server.requests and not null.judge_answers.exists()
    assert not [metric for metric in table_of(null, "base_model")["metric"] if metric.startswith("judge")]


def test_what_is_sampled_here_has_scores_of_the_judge_beside_the_others(store: Store, server):
    before = {method: table_of(store, method) for method in (*METHODS, REFERENCES)}
    asked = asking(store, server.address)
    assert not any(report.skipped for report in score_all(asked))
    # two prompts, two images each: 2 questions about each of 4 images; 3 concept images
    assert len(server.requests) == 2 * 4 * 2 + 3
    for method, earlier in before.items():
        table = table_of(asked, method)
        ours = table.filter(table["metric"].str.starts_with("judge"))
        assert table.filter(~table["metric"].str.starts_with("judge")).equals(earlier)
        assert len(ours) == (8 if method in METHODS else 3) and set(ours["encoder"]) == {"gpt-x"}
        assert not read_results(asked.scores(method, "rex") / ABSENT)
        assert all(gate.passed for gate in result_checks.scores(asked, "rex", method))
    texts = set(table_of(asked, "base_model").filter(metric="judge_pf")["text"])
    assert texts == {"a photo of a dog", "a photo of a dog on the beach"}

    assert all(report.skipped for report in score_all(asked))
    for method in (*METHODS, REFERENCES):
        shutil.rmtree(asked.scores(method, "rex"))
    number = len(server.requests)
    score_all(asked)
    assert len(server.requests) == number, "every answer was kept"
    written = [path for path in asked.root.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_the_key_and_the_pace_may_change_and_another_model_is_another_score(store: Store, server, monkeypatch):
    asked = asking(store, server.address)
    stamp = score_stamp(asked, "rex", "base_model")
    monkeypatch.setenv("OTHER_KEY", KEY)
    other = asking(store, server.address, key_variable="OTHER_KEY", requests_at_once=1)
    assert score_stamp(other, "rex", "base_model") == stamp
    assert score_stamp(asking(store, server.address, model="y"), "rex", "base_model") != stamp


def test_a_failure_leaves_no_table_and_what_was_answered_is_not_asked_again(store: Store, server):
    asked = asking(store, server.address, requests_at_once=1)
    before = table_of(store, "base_model")
    server.reply = lambda number, request: answered(number, request) if number < 3 else Reply(b"", 401)
    with pytest.raises(InputError, match="check the environment's variable JUDGE_KEY"):
        steps.score(asked, "rex", "base_model")
    assert table_of(asked, "base_model").equals(before)
    server.requests.clear()
    server.reply = answered
    steps.score(asked, "rex", "base_model")
    assert len(server.requests) == 8 - 3


def test_an_external_column_is_judged_and_an_image_seen_before_is_not_asked_about_again(store: Store, server):
    asked = asking(store, server.address)
    steps.score(asked, "rex", "base_model")
    number = len(server.requests)
    folder = asked.root / "flux"
    folder.mkdir()
    (copied,) = sorted(asked.grid("base_model", "rex").rglob("*0*0*.png"))[:1] or [None]
    assert copied is not None
    shutil.copy(copied, folder / "same.png")
    Image.new("RGB", (70, 50), (1, 2, 3)).save(folder / "other.png")
    (folder / "damaged.png").write_bytes(b"no image")
    rows = [f"{name}.png,a photo of a dog,{seed}" for seed, name in enumerate(["same", "other", "damaged"])]
    (folder / "prompts.csv").write_text("\n".join(["file,prompt,seed", *rows]) + "\n")
    steps.add_external(asked, "flux", "rex", ExternalColumn(folder=str(folder)))
    steps.score_external(asked, "rex", "flux")
    assert len(server.requests) - number == 2
    ours = table_of(asked, "flux").filter(metric="judge_cp")
    assert sorted(Path(name).name for name in ours["image"]) == ["other.png", "same.png"]


def test_a_run_is_refused_before_it_begins_where_the_key_is_not_set(store: Store, server, monkeypatch):
    asked = asking(store, server.address)
    assert not steps.problems_of(asked, ["rex"], METHODS)
    score_all(asked)
    monkeypatch.delenv("JUDGE_KEY")
    assert not steps.problems_of(asked, ["rex"], METHODS), "all is scored"
    shutil.rmtree(asked.scores("base_model", "rex"))
    (problem,) = steps.problems_of(asked, ["rex"], METHODS)
    assert "the environment's variable JUDGE_KEY, which judge.key_variable names, is not set" in str(problem)
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    gone = tiny_workspace.write_params(store.root, values | {"judge": {"local": {"model": "/nowhere"}}})
    (problem,) = steps.problems_of(gone, ["rex"], METHODS)
    assert "judge.local.model '/nowhere' is no folder" in str(problem)


def test_the_report_shows_its_scores_and_says_whose_they_are(store: Store, server):
    asked = asking(store, server.address)
    server.reply = lambda number, request: Reply("No.") if number == 0 else answered(number, request)
    score_all(asked)
    steps.compare(asked)
    folder = asked.root / "page"
    report_page.write(asked, folder)
    made = report_tables.every(read_evidence.read(asked))
    measures = made["every_measure"]
    assert {row[0] for row in measures.shown[1:] if row[1] == "gpt-x"} == {"judge_cp", "judge_pf"}
    assert "judge_cp and judge_pf were given by a vision-language model, gpt-x" in measures.note
    contract = {row["metric"]: row for row in made["contract"].frame.iter_rows(named=True)}
    assert server.address.split("/")[2] in contract["judge_pf"]["encoder_sha256"]
    assert "rubric 1" in contract["judge_cp"]["preprocessing"]
    text = (folder / "report.html").read_text()
    assert "judge_pf" in text and "vision-language model, gpt-x" in text


def test_a_report_without_a_judge_does_not_speak_of_one(store: Store):
    steps.compare(store)
    report_page.write(store, store.root / "page")
    text = (store.root / "page" / "report.html").read_text()
    assert "judge" not in text.replace(str(store.root), "") and "vision-language" not in text


def test_agreement_with_people_takes_the_judge_as_a_metric(store: Store, server):
    """Raters who always prefer the image that the judge gave the higher score."""
    asked = asking(store, server.address)
    score_all(asked)
    key = design(asked, Study(variants=METHODS, pairs=4, per_rater=4))
    scores = {
        (row["variant"], row["prompt_index"], row["image_index"]): row["score"]
        for method in METHODS
        for row in table_of(asked, method).filter(metric="judge_pf").iter_rows(named=True)
    }
    given = []
    for number, pair in enumerate(key.pairs()):
        images = [key.images[index] for index in pair]
        cells = [key.cells[image.cell] for image in images]
        one, other = (
            scores[image.variant, cell.prompt_index, cell.image_index]
            for image, cell in zip(images, cells, strict=True)
        )
        if one != other:
            given.append(("text", number, True, "left" if one > other else "right"))
    assert given
    folder = asked.root / "answers"
    folder.mkdir()
    (folder / page.KEY).write_text(key.model_dump_json())
    for rater in range(2):
        (folder / f"{rater}.json").write_text(json.dumps(small.answers(key, f"{rater:016x}", given)))
    found = pl.read_parquet(steps.study_agreement(asked, [folder]).path / AGREEMENT)
    rows = {row["metric"]: row for row in found.iter_rows(named=True)}
    assert rows["judge_pf"]["accuracy"] == 1.0 and rows["judge_pf"]["encoder"] == "gpt-x"
    assert rows["judge_cp"]["answers"] == 2 * len(given)
    steps.compare(asked)
    table = report_tables.agreement(read_evidence.read(asked))
    assert "judge_cp and judge_pf were given by a vision-language model, gpt-x" in table.note
