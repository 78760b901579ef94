"""A judge behind an address: what is sent to a real server on this machine, and what becomes of what it says."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.metrics import tables
from personalize_core.metrics.judge import chat, judging, rubric
from personalize_core.metrics.judge.chat import ChatJudge
from personalize_core.metrics.judge.kept_answers import KeptAnswers
from personalize_core.metrics.judge.questions import Question, Showing, ShownImage
from tests.metrics.judge_server import KEY, Reply, Request, Server, serving, verdict

CONCEPT = Concept("rex", "<rex>", "dog")
PROMPTS = ["a photo of a {}", "a {} on the beach"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def server():
    with serving() as running:
        yield running


def judge_of(server: Server, **changes: Any) -> ChatJudge:
    how = {"key_variable": "JUDGE_KEY", "detail": "high", "temperature": 0.0, "at_once": 2, "timeout": 60.0} | changes
    return ChatJudge(server.address, "gpt-x", **how)


def paint(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def concept_images(tmp_path: Path) -> list[Path]:
    return [paint(tmp_path / "concept" / f"{seed}.png", seed) for seed in range(3)]


@pytest.fixture
def about(tmp_path: Path) -> list[dict[str, Any]]:
    """Two images of each of two prompts."""
    rows = []
    for prompt, template in enumerate(PROMPTS):
        for image in range(2):
            path = paint(tmp_path / "grid" / f"{prompt}_{image}.png", 10 + 2 * prompt + image)
            where = {"concept": "rex", "method": "oft", "variant": "oft", "base_model": "tiny", "prompt": template}
            where |= {"image": path.relative_to(tmp_path).as_posix(), "image_sha256": "0" * 64}
            rows.append(where | {"prompt_index": prompt, "image_index": image})
    return rows


@dataclass
class Found:
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def ask_about(judge, about, concept_images, root: Path, showing: Showing | None = None, **how: Any) -> Found:
    asking, found = judging.Asking(judge, showing or Showing(), KeptAnswers(root / "answers")), Found()
    judging.judge_images(found, root, about, CONCEPT, concept_images, asking, **how)
    return found


def is_about_the_concept(request: Request) -> bool:
    return len(request.images) == 2


# -- what is sent --------------------------------------------------------------------------------------------------


def test_two_images_are_sent_for_the_concept_and_one_for_the_prompt(server, about, concept_images, tmp_path):
    ask_about(judge_of(server, at_once=1), about[:1], concept_images, tmp_path)
    prompt, concept = server.requests
    assert all(request.path == "/v1/chat/completions" for request in server.requests)
    for request in server.requests:
        assert request.body["model"] == "gpt-x" and request.body["temperature"] == 0
        assert set(request.body) == {"model", "messages", "temperature"}
        details = [part["image_url"]["detail"] for part in request.parts if part["type"] == "image_url"]
        assert set(details) == {"high"}
    (image,) = prompt.images
    sampled = Image.open(tmp_path / about[0]["image"])
    assert np.array_equal(np.asarray(image), np.asarray(sampled)) and '"a photo of a dog"' in prompt.text
    first, second = concept.images
    assert np.array_equal(np.asarray(first), np.asarray(Image.open(concept_images[0])))
    assert np.array_equal(np.asarray(second), np.asarray(sampled))
    assert "dog" in concept.text and "<rex>" not in concept.text + prompt.text


def test_an_image_is_made_smaller_and_never_larger(tmp_path):
    wide, small = paint(tmp_path / "a.png", 0, (600, 200)), paint(tmp_path / "b.png", 1, (20, 10))
    sizes = []
    for path in (wide, small):
        found = ShownImage.of(path, 300)
        sizes.append(Image.open(io.BytesIO(found.png)).size)
    assert sizes == [(300, 100), (20, 10)]


def test_detail_and_temperature_may_be_left_out(server, about, concept_images, tmp_path):
    judge = judge_of(server, detail=None, temperature=None, key_variable=None)
    ask_about(judge, about[:1], concept_images, tmp_path, Showing(detail=None, temperature=None))
    for request in server.requests:
        assert set(request.body) == {"model", "messages"} and "Authorization" not in request.headers
        assert all(set(part["image_url"]) == {"url"} for part in request.parts if part["type"] == "image_url")


def test_the_key_is_in_one_header_and_nowhere_else(server, about, concept_images, tmp_path, caplog, capfd):
    def reply(number: int, request: Request) -> Reply:
        if is_about_the_concept(request) and number < 6:
            return Reply({"error": {"message": f"no image for {KEY} today"}}, 400)
        return Reply(verdict(2))

    server.reply = reply
    judge = judge_of(server)
    found = ask_about(judge, about, concept_images, tmp_path)
    for request in server.requests:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps(request.body) + request.path
    assert found.rows and any("no image for *** today" in one["reason"] for one in found.absent)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".json" for path in written)
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    said = json.dumps([found.rows, found.absent]) + repr(judge) + caplog.text + "".join(capfd.readouterr())
    assert KEY not in said


def test_requests_are_made_at_once_and_no_more_than_asked_for(server, about, concept_images, tmp_path):
    two = threading.Barrier(2)  # each answer waits for another question

    def reply(number: int, request: Request) -> Reply:
        two.wait(60)
        return Reply(verdict(1))

    server.reply = reply
    ask_about(judge_of(server, at_once=2), about, concept_images, tmp_path)
    assert len(server.requests) == 8 and server.most_at_once == 2


# -- rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_scores_in_0_to_1_under_a_contract_that_names_judge_host_and_rubric(
    server, about, concept_images, tmp_path
):
    scores = {about[number]["image"]: number for number in range(4)}
    by_pixels = {np.asarray(Image.open(tmp_path / name)).tobytes(): score for name, score in scores.items()}

    def reply(number: int, request: Request) -> Reply:
        score = by_pixels[np.asarray(request.images[-1]).tobytes()]
        return Reply(verdict(4 if is_about_the_concept(request) else score))

    server.reply = reply
    found = ask_about(judge_of(server), about, concept_images, tmp_path)
    table = tables.from_rows(found.rows)
    by_prompt = {row["image"]: row["score"] for row in table.filter(metric="judge_pf").iter_rows(named=True)}
    assert by_prompt == {name: score / 4 for name, score in scores.items()}
    assert table.filter(metric="judge_cp")["score"].to_list() == [1.0] * 4
    host = server.address.removeprefix("http://").removesuffix("/v1")
    for row in table.iter_rows(named=True):
        assert row["encoder"] == "gpt-x" and host in row["encoder_sha256"]
        assert f"rubric {rubric.VERSION}" in row["preprocessing"] and row["scaling"] == "0 to 4, divided by 4"
    assert set(table.filter(metric="judge_pf")["text"]) == {"a photo of a dog", "a dog on the beach"}
    assert not found.absent


def test_all_that_changes_a_score_is_in_the_contract_so_that_unlike_scores_never_join():
    ways = [Showing(), Showing(image_size=256), Showing(detail=None), Showing(temperature=None)]
    ways += [Showing(repetitions=2), Showing(concept_images=2)]
    assert len(set(map(str, ways))) == len(ways)


def test_a_score_is_the_mean_over_repetitions_and_concept_images(server, about, concept_images, tmp_path):
    firsts = [np.asarray(Image.open(path)).tobytes() for path in concept_images]
    asked: list[int] = []

    def reply(number: int, request: Request) -> Reply:
        if not is_about_the_concept(request):
            return Reply(verdict(0))
        place = firsts.index(np.asarray(request.images[0]).tobytes())
        asked.append(place)
        return Reply(verdict(place + asked.count(place)))

    server.reply = reply
    showing = Showing(repetitions=2, concept_images=2, temperature=1.0)
    found = ask_about(judge_of(server, at_once=1, temperature=1.0), about[:1], concept_images, tmp_path, showing)
    (row,) = [row for row in found.rows if row["metric"] == "judge_cp"]
    assert (
        row["score"] == pytest.approx((1 + 2 + 2 + 3) / 4 / 4) and row["pairs"] == 2 and sorted(asked) == [0, 0, 1, 1]
    )


def test_a_prompt_that_changes_the_look_of_the_concept_is_not_asked_about_it(server, about, concept_images, tmp_path):
    found = ask_about(judge_of(server), about, concept_images, tmp_path, without_identity={1})
    assert {row["prompt_index"] for row in found.rows if row["metric"] == "judge_cp"} == {0}
    assert {row["prompt_index"] for row in found.rows if row["metric"] == "judge_pf"} == {0, 1}
    assert sum(map(is_about_the_concept, server.requests)) == 2


def test_images_held_out_and_trained_on_have_a_score_each(server, about, concept_images, tmp_path):
    held, trained = concept_images[2:], concept_images[:2]
    found = ask_about(judge_of(server), about, trained, tmp_path, held_out=held)
    table = tables.from_rows(found.rows)
    kinds = dict(table.filter(metric="judge_cp").select("metric", "references").rows())
    kinds |= dict(table.filter(metric="judge_cp_trained_on").select("metric", "references").rows())
    assert kinds == {"judge_cp": tables.HELD_OUT, "judge_cp_trained_on": tables.TRAINED_ON}
    none = ask_about(judge_of(server), about, concept_images, tmp_path, held_out=[])
    assert {row["metric"] for row in none.rows} == {"judge_pf", "judge_cp_trained_on"}
    assert [one["reason"] for one in none.absent] == ["of 3 concept images none is held out, and all are trained on"]


def test_a_concept_image_is_never_judged_beside_itself(server, concept_images, tmp_path):
    asking = judging.Asking(judge_of(server), Showing(), KeptAnswers(tmp_path / "answers"))
    found, alone = Found(), Found()
    judging.judge_concept_images(found, tmp_path, CONCEPT, concept_images, asking)
    assert tables.from_rows(found.rows)["image_index"].to_list() == [0, 1, 2]
    pairs = [tuple(np.asarray(image).tobytes() for image in request.images) for request in server.requests]
    assert len(set(pairs)) == 3 and all(one != other for one, other in pairs)
    judging.judge_concept_images(alone, tmp_path, CONCEPT, concept_images[:1], asking)
    assert not alone.rows and alone.absent[0]["reason"] == judging.ALONE


# -- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        '{"score": 3, "reason": "ears"}',
        '\n {"reason": "ears", "score": 3} ',
        '```json\n{"score": 3, "reason": "ears"}\n```',
        '```\n{"score": 3, "reason": "ears"}```',
        '<think>\nThe score might be {"score": 1}.\n</think>\n\n{"score": 3, "reason": "ears"}',
    ],
)
def test_what_is_read(answer):
    assert rubric.read(answer) == rubric.Verdict(3, "ears")


@pytest.mark.parametrize(
    "answer",
    [
        "", "3", "score: 3", '{"score": 3}', '{"score": "3", "reason": ""}', '{"score": 3.0, "reason": ""}',
        '{"score": 5, "reason": ""}', '{"score": -1, "reason": ""}', '{"score": true, "reason": ""}',
        '{"score": null, "reason": ""}', '[{"score": 3, "reason": ""}]', '{"score": 3, "reason": 1}',
        '{"score": 3, "reason": "", "sure": 1}', 'I say {"score": 3, "reason": ""}',
        '{"score": 3, "reason": ""} {"score": 1, "reason": ""}', "[" * 10_000, "x" * 30_000,
        '```json\n{"score": 3, "reason": ""}\n``` or ```json\n{"score": 1, "reason": ""}\n```',
    ],
)  # fmt: skip
def test_what_is_not_read(answer):
    with pytest.raises(rubric.Unreadable):
        rubric.read(answer)


def test_an_answer_that_cannot_be_read_is_asked_for_again(server, about, concept_images, tmp_path):
    server.reply = lambda number, request: Reply("I would say 3." if number == 0 else verdict(1))
    found = ask_about(judge_of(server, at_once=1), about[:1], concept_images, tmp_path)
    assert len(server.requests) == 3 and [row["score"] for row in found.rows] == [0.25, 0.25]


def test_an_image_whose_answers_cannot_be_read_has_no_score_and_a_reason(server, about, concept_images, tmp_path):
    def reply(number: int, request: Request) -> Reply:
        return Reply("Beautiful!" if is_about_the_concept(request) else verdict(4))

    server.reply = reply
    found = ask_about(judge_of(server), about, concept_images, tmp_path)
    assert [row["metric"] for row in found.rows] == ["judge_pf"] * 4
    expected = "the judge's answer could not be read, 3 times: it is not one JSON object"
    assert [(one["metric"], one["encoder"], one["reason"]) for one in found.absent] == [
        ("judge_cp", "gpt-x", expected)
    ] * 4
    assert [one["image"] for one in found.absent] == [row["image"] for row in about]
    assert sum(map(is_about_the_concept, server.requests)) == 4 * 3
    kept = [json.loads(path.read_text()) for path in (tmp_path / "answers").rglob("*.json")]
    assert [one["unreadable"] for one in kept if one["score"] is None] == [["Beautiful!"] * 3] * 4


def test_a_refusal_of_one_image_leaves_the_others(server, about, concept_images, tmp_path):
    refused = np.asarray(Image.open(tmp_path / about[0]["image"])).tobytes()

    def reply(number: int, request: Request) -> Reply:
        if np.asarray(request.images[-1]).tobytes() == refused:
            return Reply({"error": {"message": "against our policy"}}, 400)
        return Reply(verdict(4))

    server.reply = reply
    found = ask_about(judge_of(server), about, concept_images, tmp_path)
    assert len(found.rows) == 6 and {one["image"] for one in found.absent} == {about[0]["image"]}
    assert all("refused it: HTTP 400: against our policy" in one["reason"] for one in found.absent)


def test_a_judge_that_refuses_all_is_an_error(server, about, concept_images, tmp_path):
    server.reply = lambda number, request: Reply({"error": {"message": "temperature must be 1"}}, 400)
    with pytest.raises(InputError, match="answered no question and refused 8.*temperature must be 1"):
        ask_about(judge_of(server), about, concept_images, tmp_path)
    server.requests.clear()
    with pytest.raises(InputError, match="answered no question"):
        ask_about(judge_of(server, at_once=1), about * 20, concept_images, tmp_path)
    assert len(server.requests) == judging.MOST_REFUSED


def test_a_judge_whose_model_refuses_all_has_answered(server, about, concept_images, tmp_path):
    """As of photographs of a person: the judge is set up well, and these images have no score, with the reason."""
    refusal = {"choices": [{"message": {"content": None, "refusal": "I cannot judge people"}}]}
    server.reply = lambda number, request: Reply(refusal)
    found = ask_about(judge_of(server), about, concept_images, tmp_path)
    assert not found.rows and len(found.absent) == 8
    assert all("I cannot judge people" in one["reason"] for one in found.absent)


def test_an_error_ends_the_waits_of_other_questions(server, about, concept_images, tmp_path):
    """One question is to be asked again in a minute or so; the key is refused for another."""
    first = threading.Event()

    def reply(number: int, request: Request) -> Reply:
        if number == 0:
            first.set()
            return Reply("", 429, {"Retry-After": "100"})
        first.wait(60)
        return Reply("", 401)

    server.reply = reply
    with pytest.raises(InputError, match="does not accept the key"):
        ask_about(judge_of(server), about, concept_images, tmp_path)


# -- a server in trouble --------------------------------------------------------------------------------------------


def question(tmp_path: Path) -> Question:
    return Question("Which?", [ShownImage.of(paint(tmp_path / "one.png", 1), 64)])


@pytest.mark.parametrize(
    "trouble",
    [
        Reply({"error": {"message": "too many"}}, 429, {"Retry-After": "0"}),
        Reply(b"<html>", 500),
        Reply(b"", 503),
        Reply(b"not JSON"),
        Reply({"choices": []}),
        Reply(b'{"choices": [{"mess', 200, {"Content-Length": "9999"}),  # the connection ends before the answer does
    ],
    ids=["429", "500", "503", "no JSON", "no choice", "broken off"],
)
def test_a_server_in_trouble_is_asked_again(trouble, server, tmp_path):
    server.reply = lambda number, request: trouble if number < 2 else Reply(verdict(3))
    assert judge_of(server).ask(question(tmp_path)) == verdict(3)
    assert len(server.requests) == 3


def test_a_slow_server_is_not_waited_for_for_ever(server, tmp_path):
    asked_again = threading.Event()

    def reply(number: int, request: Request) -> Reply:
        if number == 0:
            asked_again.wait(60)
        asked_again.set()
        return Reply(verdict(3))

    server.reply = reply
    assert judge_of(server, timeout=1.0).ask(question(tmp_path)) == verdict(3)
    assert len(server.requests) >= 2


def test_retry_after_is_obeyed_as_seconds_or_as_a_date(server, tmp_path):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    waits = {0: "1", 1: date}
    server.reply = lambda number, request: (
        Reply("", 429, {"Retry-After": waits[number]}) if number in waits else Reply(verdict(3))
    )
    waited: list[float] = []
    not_waiting = SimpleNamespace(wait=lambda seconds: waited.append(seconds), is_set=lambda: False)
    assert judge_of(server, _stopped=not_waiting).ask(question(tmp_path)) == verdict(3)
    assert waited[0] == 1.0 and 0 < waited[1] <= 100
    assert [chat._retry_after(value) for value in (None, "soon", "-3")] == [None, None, None]


def test_a_server_that_stays_busy_is_given_up(server, tmp_path):
    server.reply = lambda number, request: Reply({"error": {"message": "overloaded"}}, 503)
    with pytest.raises(InputError, match=r"no answer in 6 attempts: HTTP 503: overloaded.*Answers so far are kept"):
        judge_of(server).ask(question(tmp_path))
    assert len(server.requests) == chat.ATTEMPTS


def test_no_server_at_all(server, tmp_path):
    judge = ChatJudge("http://127.0.0.1:9/v1", "gpt-x", None, None, 0.0, 1, 1.0)
    with pytest.raises(InputError, match=r"the judge at 127\.0\.0\.1:9 gave no answer.*refused"):
        judge.ask(question(tmp_path))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "it does not accept the key; check the environment's variable JUDGE_KEY"),
        (403, "may not use this model"),
        (404, "check judge.address, which mostly ends in /v1, and judge.model"),
        (302, "a key goes nowhere but to its address"),
        (418, "HTTP 418: wrong key"),
    ],
)
def test_a_wrong_set_up_is_said_at_once_with_advice_and_without_the_key(status, said, server, tmp_path):
    elsewhere = {"Location": f"{server.address}/elsewhere"} if status == 302 else {}
    server.reply = lambda number, request: Reply({"error": {"message": f"wrong key {KEY}"}}, status, elsewhere)
    with pytest.raises(InputError) as refused:
        judge_of(server).ask(question(tmp_path))
    assert said in str(refused.value) and KEY not in str(refused.value) and len(server.requests) == 1
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


def test_a_key_that_a_server_repeats_is_in_no_message_however_it_is_cut(server, tmp_path):
    """Messages are cut after 300 characters: of a key that lies there, no beginning is left."""
    for before in range(300 - len(KEY), 301):
        server.reply = lambda number, request, before=before: Reply({"error": {"message": "x" * before + KEY}}, 400)
        with pytest.raises(judging.Refused) as refused:
            judge_of(server).ask(question(tmp_path))
        assert KEY[:4] not in str(refused.value)
    server.reply = lambda number, request: Reply(verdict(2, f"your key is {KEY}"))
    assert judge_of(server).ask(question(tmp_path)) == verdict(2, "your key is ***")


def test_a_key_for_this_machine_goes_through_no_proxy(server, tmp_path, monkeypatch):
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        assert judge_of(server).ask(question(tmp_path)) == verdict(3)
        assert len(server.requests) == 1 and not proxy.requests


@pytest.mark.parametrize("value", ["", "  ", "line\nbreak", "schlüssel"])
def test_a_key_that_is_not_there_is_said_before_anything_is_sent(value, server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(InputError, match="environment's variable JUDGE_KEY, which judge.key_variable names") as refused:
        judge_of(server).ask(question(tmp_path))
    assert not server.requests and (not value.strip() or value not in str(refused.value))


def test_a_reply_without_end_is_not_read(server, about, concept_images, tmp_path):
    server.reply = lambda number, request: Reply(verdict(1, "x" * (chat.MOST_BYTES + 1)) if number == 0 else verdict(1))
    found = ask_about(judge_of(server, at_once=1), about[:1], concept_images, tmp_path)
    assert [one["reason"] for one in found.absent] == ["the judge's reply has more than 1,048,576 bytes"]


def test_contents_in_parts_and_refusals(server, tmp_path):
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": verdict(2)}]
    server.reply = lambda number, request: Reply({"choices": [{"message": {"content": parts}}]})
    assert judge_of(server).ask(question(tmp_path)) == verdict(2)
    server.reply = lambda number, request: Reply({"choices": [{"message": {"content": None, "refusal": "I will not"}}]})
    with pytest.raises(judging.Refused, match="I will not"):
        judge_of(server).ask(question(tmp_path))


# -- what is kept --------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(server, about, concept_images, tmp_path):
    first = ask_about(judge_of(server), about, concept_images, tmp_path)
    assert len(server.requests) == 8
    again = ask_about(judge_of(server, key_variable="NOT_SET"), about, concept_images, tmp_path)
    assert len(server.requests) == 8 and again == first

    copied = tmp_path / "other" / "of_another_column.png"
    copied.parent.mkdir()
    copied.write_bytes((tmp_path / about[0]["image"]).read_bytes())
    row = about[0] | {"image": "other/of_another_column.png", "method": "flux", "variant": "flux"}
    ask_about(judge_of(server), [row], concept_images, tmp_path)
    assert len(server.requests) == 8


def test_another_question_is_asked(server, about, concept_images, tmp_path, monkeypatch):
    def asked(judge: ChatJudge, showing: Showing | None = None, images: list[Path] | None = None) -> int:
        before = len(server.requests)
        ask_about(judge, about[:1], images or concept_images, tmp_path, showing)
        return len(server.requests) - before

    assert asked(judge_of(server)) == 2
    assert asked(judge_of(server), images=concept_images[1:]) == 1  # another concept image, the same prompt
    assert asked(judge_of(server), Showing(image_size=32)) == 2
    assert asked(judge_of(server), Showing(repetitions=2)) == 2  # the second time of each
    assert asked(judge_of(server, detail="low")) == asked(judge_of(server, temperature=1.0)) == 2
    monkeypatch.setattr(rubric, "VERSION", rubric.VERSION + 1)
    assert asked(judge_of(server)) == 2
    assert asked(judge_of(server)) == 0


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"mark": "personalize judge answer 1", "score": 9, "reason": ""}']
)
def test_a_damaged_answer_is_asked_for_again(damage, server, about, concept_images, tmp_path):
    ask_about(judge_of(server), about[:1], concept_images, tmp_path)
    for path in (tmp_path / "answers").rglob("*.json"):
        path.write_bytes(damage)
    found = ask_about(judge_of(server), about[:1], concept_images, tmp_path)
    assert len(server.requests) == 4 and [row["score"] for row in found.rows] == [0.75, 0.75]


def test_after_a_failure_only_the_rest_is_asked(server, about, concept_images, tmp_path):
    server.reply = lambda number, request: Reply(verdict(2)) if number < 5 else Reply(b"", 401)
    with pytest.raises(InputError, match="HTTP 401"):
        ask_about(judge_of(server, at_once=1), about, concept_images, tmp_path)
    server.requests.clear()
    server.reply = lambda number, request: Reply(verdict(2))
    found = ask_about(judge_of(server), about, concept_images, tmp_path)
    assert len(server.requests) == 3 and len(found.rows) == 8


KILLED = """
import sys
from pathlib import Path
import json
from personalize_core.concepts.concept import Concept
from personalize_core.metrics.judge import judging
from personalize_core.metrics.judge.chat import ChatJudge
from personalize_core.metrics.judge.kept_answers import KeptAnswers
from personalize_core.metrics.judge.questions import Showing
class Found:
    absent = []

    def add(self, row):
        pass


root, address, about, images = json.loads(sys.argv[1])
asking = judging.Asking(
    ChatJudge(address, "gpt-x", None, "high", 0.0, 1, 5.0), Showing(), KeptAnswers(Path(root) / "answers")
)
judging.judge_images(Found(), Path(root), about, Concept("rex", "<rex>", "dog"), [Path(one) for one in images], asking)
"""


def test_whoever_is_killed_goes_on_where_it_was(server, about, concept_images, tmp_path):
    given = json.dumps([str(tmp_path), server.address, about, [str(path) for path in concept_images]])
    process = subprocess.Popen([sys.executable, "-c", KILLED, given])

    def reply(number: int, request: Request) -> Reply:
        if number == 4:
            os.kill(process.pid, signal.SIGKILL)
        return Reply(verdict(1))

    server.reply = reply
    assert process.wait(60) == -signal.SIGKILL
    server.requests.clear()
    server.reply = lambda number, request: Reply(verdict(1))
    found = ask_about(judge_of(server, key_variable=None), about, concept_images, tmp_path)
    assert len(server.requests) == 4 and len(found.rows) == 8


def test_progress_is_told_image_by_image(server, about, concept_images, tmp_path):
    told: list[tuple[int, int]] = []
    asking = judging.Asking(
        judge_of(server), Showing(), KeptAnswers(tmp_path / "answers"), lambda done, total: told.append((done, total))
    )
    judging.judge_images(Found(), tmp_path, about, CONCEPT, concept_images, asking)
    assert told == [(number, 4) for number in range(5)]
