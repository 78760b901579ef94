"""Who is told what, over a real HTTP server, a real SMTP server and a real command; and that no run waits for them."""

from __future__ import annotations

import email
import json
import logging
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.message import Message as Letter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.workspace.automation import Notify
from personalize_core.workspace.store import Store
from pipelines.assets import chain
from pipelines.automation import notifications
from pipelines.definitions import defs
from pipelines.messages import delivery, messages
from pipelines.messages.delivery import Message
from pipelines.presentation import metadata
from pipelines.resources import Workspace
from tests.in_dagster import materialize, passing
from tests.watching import Watch, choose, concept

PAIR = dg.MultiPartitionKey({"concept": "dog7", "method": "textual_inversion"})
SECRET = "/services/T000/B000/very-secret"
MESSAGE = Message(
    "run-1", "failed_run", "learn <failed>", "the disk is full: free some", "http://ui/runs/1", "rex", "core"
)


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[int]:
    """The port that it listens on."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]  # type: ignore[index]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hook(HTTPServer):
    """Remembers what is posted, and answers with the next of `statuses`, then with 200."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, Any]] = []
        self.statuses: list[int] = []
        super().__init__(("127.0.0.1", 0), _Post)


class _Post(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, json.loads(body)))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Post(socketserver.TCPServer):
    """An SMTP server (RFC 5321) that takes every letter."""

    allow_reuse_address = True

    def __init__(self) -> None:
        self.letters: list[tuple[list[str], Letter]] = []
        super().__init__(("127.0.0.1", 0), _Session)


class _Session(socketserver.StreamRequestHandler):
    server: Post

    def handle(self) -> None:
        self.say("220 here")
        recipients: list[str] = []
        while line := self.rfile.readline().decode():
            command = line.split(maxsplit=1)[0].upper() if line.strip() else ""
            if command == "RCPT":
                recipients.append(line.partition("<")[2].partition(">")[0])
            if command == "DATA":
                self.say("354 go on")
                lines = []
                while (line := self.rfile.readline().decode()) != ".\r\n":
                    lines.append(line)
                self.server.letters.append((recipients, email.message_from_string("".join(lines))))
            self.say("221 bye" if command == "QUIT" else "250 ok")

    def say(self, answer: str) -> None:
        self.wfile.write(f"{answer}\r\n".encode())


@pytest.fixture
def hook(monkeypatch) -> Iterator[Hook]:
    with Hook() as server, serving(server) as port:
        monkeypatch.setenv("TEAM_WEBHOOK", f"http://127.0.0.1:{port}{SECRET}")
        yield server


@pytest.fixture
def store(tmp_path) -> Store:
    choose(tmp_path, notify={"webhook": "TEAM_WEBHOOK", "link": "http://ui/"})
    return Store(tmp_path)


def files(store: Store) -> list[Path]:
    return sorted(delivery.folder_of(store).glob("*.json"))


# Channels


def test_a_webhook_is_sent_what_slack_takes(store, hook):
    assert delivery.write(store, MESSAGE)
    assert delivery.deliver(store) == (1, [])
    text = "*learn &lt;failed&gt;*\nthe disk is full: free some\n<http://ui/runs/1|Open in Dagster>"
    assert hook.posted == [(SECRET, {"text": text})]


def test_a_letter_is_sent_to_everybody(tmp_path):
    with Post() as server, serving(server) as port:
        addresses = {"to": ["a@lab.example", "b@lab.example"], "sender": "personalize@lab.example"}
        choose(tmp_path, notify={"email": addresses | {"host": "127.0.0.1", "port": port}})
        store = Store(tmp_path)
        delivery.write(store, MESSAGE)
        assert delivery.deliver(store) == (1, [])
    ((recipients, letter),) = server.letters
    assert recipients == ["a@lab.example", "b@lab.example"] and letter["To"] == "a@lab.example, b@lab.example"
    assert letter["Subject"] == "Personalize: learn <failed>"
    assert str(letter.get_payload()).split() == [*"the disk is full: free some http://ui/runs/1".split()]


def test_a_command_reads_the_message_as_json(tmp_path):
    program = "import sys; open('told', 'w').write(sys.stdin.read())"
    choose(tmp_path, notify={"command": [sys.executable, "-c", program]})
    delivery.write(Store(tmp_path), MESSAGE)
    assert delivery.deliver(Store(tmp_path)) == (1, [])
    told = json.loads((tmp_path / "told").read_text())
    assert (told["kind"], told["concept"], told["method"], told["sentence"], told["link"]) == (
        "failed_run", "rex", "core", "the disk is full: free some", "http://ui/runs/1",
    )  # fmt: skip


def test_a_command_that_fails_says_why(tmp_path):
    choose(tmp_path, notify={"command": [sys.executable, "-c", "import sys; sys.exit('no such channel')"]})
    delivery.write(Store(tmp_path), MESSAGE)
    done, (problem,) = delivery.deliver(Store(tmp_path))
    assert done == 0 and problem.endswith("ended with exit code 1: no such channel")


# Again, and once


def test_what_is_not_taken_is_sent_again_after_a_while_and_then_no_more(store, hook):
    hook.statuses = [500, 503]
    delivery.write(store, MESSAGE)
    sent = []
    for seconds in (0, 29, 31, 60, 92, 1000):  # the first wait is 30 s, the second 60 s
        delivery.deliver(store, lambda seconds=seconds: 1e9 + seconds)
        sent.append(len(hook.posted))
    assert sent == [1, 1, 2, 2, 3, 3]


def test_it_is_given_up_after_a_day(store, hook):
    hook.statuses, now = [500] * 1000, 1e9
    delivery.write(store, MESSAGE)
    while len(hook.posted) < delivery.ATTEMPTS:
        delivery.deliver(store, lambda now=now: now)
        now += delivery.LONGEST_WAIT
    delivery.deliver(store, lambda: now + delivery.LONGEST_WAIT)
    assert len(hook.posted) == delivery.ATTEMPTS
    assert sum(min(delivery.LONGEST_WAIT, delivery.FIRST_WAIT * 2**n) for n in range(delivery.ATTEMPTS)) > 80_000


def test_the_same_is_told_once(store, hook):
    assert delivery.write(store, MESSAGE)
    assert not delivery.write(store, MESSAGE)
    delivery.deliver(store)
    assert not delivery.write(store, MESSAGE)
    delivery.deliver(store)
    assert len(hook.posted) == 1


def test_a_channel_that_works_is_not_told_twice_because_another_does_not(tmp_path, hook):
    choose(tmp_path, notify={"webhook": "TEAM_WEBHOOK", "command": ["false"]})
    store = Store(tmp_path)
    delivery.write(store, MESSAGE)
    for seconds in (0, 1e4):
        delivery.deliver(store, lambda seconds=seconds: 1e9 + seconds)
    assert len(hook.posted) == 1


def test_without_a_section_nothing_is_written(tmp_path):
    choose(tmp_path)
    assert not delivery.write(Store(tmp_path), MESSAGE)
    assert files(Store(tmp_path)) == []


# Secrets


@pytest.mark.parametrize("url", [f"ftp://host{SECRET}", f"http://127.0.0.1:x{SECRET}", f"http://[{SECRET}", ""])
def test_no_secret_is_in_a_problem_or_a_file(store, url, monkeypatch):
    monkeypatch.setenv("TEAM_WEBHOOK", url)
    delivery.write(store, MESSAGE)
    done, (problem,) = delivery.deliver(store)
    assert done == 0 and "secret" not in problem
    assert all("secret" not in path.read_text() for path in store.data.rglob("*") if path.is_file())


def test_a_redirect_is_not_followed(store, hook):
    hook.statuses = [302]
    delivery.write(store, MESSAGE)
    done, (problem,) = delivery.deliver(store)
    assert done == 0 and "302" in problem and len(hook.posted) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"webhook": "https://hooks.slack.com/services/T0/B0/x"},
        {"email": {"to": ["a@b.c"], "sender": "a@b.c", "user": "me"}},
        {"email": {"to": ["a@b.c"], "sender": "a@b.c", "user": "me", "password": "P", "host": "mail.example"}},
        {"email": {"to": ["a@b.c\nBcc: everybody@b.c"], "sender": "a@b.c"}},
        {"link": "javascript:alert(1)"},
        {"digest": "7"},
        {"command": []},
    ],
)
def test_a_section_that_would_leak_or_fail_is_refused(tmp_path, wrong):
    choose(tmp_path, notify=wrong)
    with pytest.raises(InputError, match="automation.notify"):
        delivery.configured(Store(tmp_path))


# What is told


def tick(store: Store, instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[str, str | None]:
    """What the sensor says, and its cursor."""
    with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
        said = notifications.notifications(context, workspace=Workspace(root=str(store.root)))
    assert isinstance(said, dg.SensorResult) and isinstance(said.skip_reason, dg.SkipReason)
    return said.skip_reason.skip_message or "", said.cursor


def fails(*arguments: object) -> Any:
    raise InputError("the recipe wants 12 class images; write class_images: 12")


@pytest.fixture
def steps_stand_in(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "check_inputs", lambda *arguments: None)
    monkeypatch.setattr(steps, "plan", lambda *arguments: [])
    monkeypatch.setattr(steps, "long_work_notice", lambda *arguments: None)
    for name in ("recipe_stamp", "sampling_stamp", "scoring_stamp"):
        monkeypatch.setattr(steps, name, lambda *arguments: "settings")
    for name in ("artifact", "grid", "scores", "identity"):
        monkeypatch.setattr(steps.result_checks, name, passing(name))
    for name in ("loss_curve", "scores_by_prompt"):
        monkeypatch.setattr(metadata, name, lambda report: {})
    for name in ("train", "sample_grid", "score"):
        monkeypatch.setattr(steps, name, lambda *arguments: steps.Report("s", False, 1.0, tmp_path))


def test_a_failed_run_is_one_message_with_concept_method_sentence_and_link(
    store, hook, steps_stand_in, monkeypatch, tmp_path
):
    monkeypatch.setattr(steps, "train", fails)
    monkeypatch.chdir(tmp_path)
    with dg.DagsterInstance.local_temp() as instance:
        instance.add_dynamic_partitions("concept", ["dog7"])
        job = defs.resolve_job_def("learn")
        failed = job.execute_in_process(instance=instance, partition_key=PAIR, raise_on_error=False)
        (event,) = [each for each in failed.all_events if each.event_type_value == "PIPELINE_FAILURE"]
        for _ in range(2):
            context = dg.build_run_status_sensor_context(
                "failed_runs", event, instance, failed.dagster_run, partition_key=PAIR
            ).for_run_failure()
            notifications.failed_runs(context, workspace=Workspace(root=str(tmp_path)))
            assert tick(store, instance)[0] in ("1 messages delivered", "no message was due")
    ((_, posted),) = hook.posted
    assert posted["text"] == (
        "*learn of textual_inversion on dog7 failed*\nthe recipe wants 12 class images; write class_images: 12\n"
        f"<http://ui/runs/{failed.run_id}|Open in Dagster>"
    )


def test_a_failed_check_is_told_by_its_run_which_does_not_wait_and_a_warning_is_not(
    store, instance, steps_stand_in, monkeypatch, tmp_path
):
    """No server is there; the run ends as always."""
    monkeypatch.setenv("TEAM_WEBHOOK", "http://127.0.0.1:9/")

    def gates(*arguments: object) -> list[steps.result_checks.Gate]:
        found = [("loss_finite", False, True), ("loss_falls", False, False), ("artifact_restores", True, True)]
        return [steps.result_checks.Gate(name, ok, f"{name}: nan at step 3", serious=bad) for name, ok, bad in found]

    monkeypatch.setattr(steps.result_checks, "artifact", gates)
    done = materialize(instance, tmp_path, [chain.artifact], PAIR, raise_on_error=False)
    (path,) = files(store)
    about = json.loads(path.read_text())["message"]
    assert (about["title"], about["sentence"], about["concept"], about["method"]) == (
        "the check loss_finite of textual_inversion on dog7 failed", "loss_finite: nan at step 3", "dog7",
        "textual_inversion",
    )  # fmt: skip
    assert about["link"] == "http://ui/assets/artifact?view=partitions&partition=dog7%7Ctextual_inversion"
    assert delivery.is_written(store, f"check-{done.run_id}")  # so that the run's own failure is not told as well


def test_a_refused_folder_is_told_once_with_its_reason(store, hook, instance, tmp_path):
    watch = Watch(instance, tmp_path)
    folder = concept(tmp_path / "data" / "concepts", "cat2")
    (folder / "00.png").write_bytes(b"no image")
    for _ in range(3):
        watch.tick()
        delivery.deliver(store)
    ((_, posted),) = hook.posted
    assert "the folder 'cat2' was refused" in posted["text"] and "00.png" in posted["text"]
    assert posted["text"].endswith("<http://ui/assets/concept_images?view=partitions&partition=cat2|Open in Dagster>")


def test_nothing_that_goes_wrong_with_a_message_reaches_a_run(store, caplog):
    def broken(link: str) -> Message:
        raise OSError("the disk is full")

    messages.tell(store, broken, logging.getLogger("personalize"))
    assert "could not be written down: the disk is full" in caplog.text


# The digest


def scored(instance: dg.DagsterInstance, tmp_path: Path, monkeypatch, **means: float) -> None:
    report = steps.Report(str(means), False, 1.0, tmp_path, means)
    monkeypatch.setattr(steps, "score", lambda *arguments: report)
    materialize(instance, tmp_path, [chain.artifact, chain.image_grid, chain.metrics], PAIR)


def test_a_digest_tells_what_was_trained_and_what_moved_beyond_noise(
    store, instance, steps_stand_in, monkeypatch, tmp_path
):
    scored(instance, tmp_path, monkeypatch, clip_i=0.700, dino=0.50, clip_t=0.30, clip_t_scaled=0.75)
    scored(instance, tmp_path, monkeypatch, clip_i=0.719, dino=0.47, clip_t=0.33, clip_t_scaled=0.825)  # noise: 0.02
    cell = steps.Cell("dog7", "core", "train", "recipe changed: lr 0.1 -> 0.2", True)
    monkeypatch.setattr(steps, "plan", lambda *arguments: [cell])
    title, text = notifications.summed_up(instance, store, datetime.now().astimezone())
    assert title == "1 trained, 1 better, 1 worse, 0 failed"
    assert text.splitlines() == [
        "Trained (1):", "- textual_inversion on dog7",
        "Better beyond noise (1):", "- textual_inversion on dog7: clip_t 0.300 -> 0.330",
        "Worse beyond noise (1):", "- textual_inversion on dog7: dino 0.500 -> 0.470",
        "Waiting (1):", "- core on dog7: recipe changed: lr 0.1 -> 0.2",
    ]  # fmt: skip


def test_a_digest_names_what_is_under_way_with_or_without_a_partition(store, instance, monkeypatch):
    monkeypatch.setattr(steps, "plan", lambda *arguments: [])
    for job, tags in (("compare", {}), ("learn", {"dagster/partition": "dog7|core"})):
        definition, status = defs.resolve_job_def(job), dg.DagsterRunStatus.STARTED
        instance.create_run_for_job(definition, status=status, tags=tags)
    _, text = notifications.summed_up(instance, store, datetime.now().astimezone())
    assert text.splitlines() == ["Under way (2):", "- compare", "- learn of core on dog7"]


def test_a_digest_is_written_once_a_day_and_not_on_the_first(store, hook, instance, monkeypatch):
    monkeypatch.setattr(steps, "plan", lambda *arguments: [])
    _, cursor = tick(store, instance)
    assert cursor == f"{datetime.now():%Y-%m-%d}" and files(store) == []
    notify, day = Notify(webhook="W"), "2026-11-29"
    times = {hour: datetime.fromisoformat(f"{day}T{hour}") for hour in ("06:59", "07:00", "23:00")}
    assert [notifications.digest_is_due(notify, "2026-11-28", when) for when in times.values()] == [False, True, True]
    assert not notifications.digest_is_due(notify, day, times["23:00"])
    assert not notifications.digest_is_due(Notify(webhook="W", digest=None), "2026-11-28", times["23:00"])
    for _ in range(2):
        notifications.write_digest(instance, store, times["07:00"])
    assert [path.name for path in files(store)] == ["digest-2026-11-29.json"]
