"""Messages to people: written down where nothing waits for them, and delivered from there, again until it succeeds.

A message is a file of data/.work/messages. Whoever has something to tell writes one, once for each name; the sensor
`notifications` delivers. A secret, a webhook's URL or a password, is read from the environment when it is used, and
is in no file and no log.
"""

from __future__ import annotations

import json
import os
import re
import smtplib
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.http import masked, open_exactly

if TYPE_CHECKING:
    from personalize_core.workspace.automation import Email, Notify
    from personalize_core.workspace.store import Store

FIRST_WAIT, LONGEST_WAIT = 30.0, 3600.0  # seconds before another attempt, twice as many after each
ATTEMPTS = 30  # over a day; then it is given up
TIMEOUT = 5.0  # seconds, of each exchange with a server; of a command, twice
AT_ONCE = 20.0  # seconds after which a tick begins no further delivery; Dagster ends one after 60
KEPT = 7 * 86400.0  # seconds: a delivered message stays, so that the same is not told twice


@dataclass(frozen=True)
class Message:
    """What a person is told.

    Args:
        name: of its file. The same name is told once.
        kind: failed_run, failed_check, refused_folder or digest.
        title: one line.
        sentence: what happened and what to do; a digest has several lines.
        link: where the UI shows it.
    """

    name: str
    kind: str
    title: str
    sentence: str
    link: str
    concept: str | None = None
    method: str | None = None


class Undelivered(Exception):
    """A server or command did not take a message; without secrets."""


def folder_of(store: Store) -> Path:
    return store.work("messages")


def write(store: Store, message: Message) -> bool:
    """Have a message delivered; False where one of this name was written before, or params.yaml names nobody to tell.

    Raises:
        InputError: params.yaml is damaged.
    """
    from personalize_core.files.atomic import write_json

    path = _path(store, message.name)
    if path.exists() or not configured(store).channels:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"kind": message.kind, "title": message.title, "concept": message.concept, "method": message.method}
    about |= {"sentence": message.sentence, "link": message.link}
    write_json(path, {"message": about, "written": time.time(), "delivered": [], "attempts": 0, "next": 0.0})
    return True


def is_written(store: Store, beginning: str) -> bool:
    """Is there a message whose name begins so?"""
    return any(folder_of(store).glob(f"{_file_name(beginning)}*.json"))


def configured(store: Store) -> Notify:
    from personalize_core.workspace.params import Params

    return Params.read_automation(store.root / "params.yaml").notify


def deliver(store: Store, now: Callable[[], float] = time.time) -> tuple[int, list[str]]:
    """Deliver what is due, the oldest first.

    Returns:
        How many messages have reached everybody, and what did not work, a sentence each.

    Raises:
        InputError: params.yaml is damaged.
    """
    from personalize_core.files.atomic import read_record, write_json

    notify, begun, done, problems = configured(store), time.monotonic(), 0, []
    found = [(path, read_record(path)) for path in folder_of(store).glob("*.json")]
    for path, about in sorted(found, key=lambda each: each[1].get("written", 0.0)):
        if "message" not in about:
            path.unlink(missing_ok=True)  # damaged
            continue
        left = [name for name in notify.channels if name not in about["delivered"]]
        if not left or about["attempts"] >= ATTEMPTS:
            if now() - about["written"] > KEPT:
                path.unlink(missing_ok=True)
            continue
        if about["next"] > now() or time.monotonic() - begun > AT_ONCE:
            continue
        for name in left:
            try:
                _send(name, notify, about["message"], store.root)
                about["delivered"].append(name)
            except Undelivered as error:
                problems.append(f"{about['message']['title']!r} by {name}: {error}")
        if set(notify.channels) <= {*about["delivered"]}:
            done += 1
        else:
            about["next"] = now() + min(LONGEST_WAIT, FIRST_WAIT * 2 ** about["attempts"])
            about["attempts"] += 1
        write_json(path, about)
    return done, problems


# Channels


def _send(name: str, notify: Notify, message: dict[str, Any], root: Path) -> None:
    """Raises Undelivered, whatever was raised."""
    secrets: list[str] = []

    def secret(variable: str) -> str:
        value = os.environ.get(variable)
        if not value:
            raise Undelivered(f"the environment's variable {variable} is not set where `make ui` was started")
        secrets.append(value)
        return value

    try:
        if name == "webhook" and notify.webhook:
            _post(secret(notify.webhook), {"text": _slack(message)})
        elif name == "email" and notify.email:
            _mail(notify.email, message, secret)
        elif name == "command" and notify.command:
            _run(notify.command, message, root)
    except Undelivered:
        raise
    except Exception as error:  # of libraries; some name the URL
        raise Undelivered(masked(f"{type(error).__name__}: {error}", secrets)) from None


def _post(url: str, content: dict[str, Any]) -> None:
    if not re.match(r"https?://", url):
        raise Undelivered("the webhook's URL begins with neither http:// nor https://")
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with open_exactly(request, TIMEOUT) as answer:
        answer.read(1000)


def _slack(message: dict[str, Any]) -> str:
    """https://api.slack.com/reference/surfaces/formatting: three characters are escaped, a link is <URL|TEXT>."""

    def plain(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    return f"*{plain(message['title'])}*\n{plain(message['sentence'])}\n<{message['link']}|Open in Dagster>"


def _mail(email: Email, message: dict[str, Any], secret: Callable[[str], str]) -> None:
    letter = EmailMessage()
    letter["Subject"] = " ".join(f"Personalize: {message['title']}".split())
    letter["From"], letter["To"] = email.sender, ", ".join(email.to)
    letter.set_content(f"{message['sentence']}\n\n{message['link']}\n")
    password = secret(email.password) if email.password else ""
    trusted = ssl.create_default_context()
    if email.security == "tls":
        server: smtplib.SMTP = smtplib.SMTP_SSL(email.host, email.port, timeout=TIMEOUT, context=trusted)
    else:
        server = smtplib.SMTP(email.host, email.port, timeout=TIMEOUT)
    with server:
        if email.security == "starttls":
            server.starttls(context=trusted)
        if email.user:
            server.login(email.user, password)
        server.send_message(letter)


def _run(command: list[str], message: dict[str, Any], root: Path) -> None:
    done = subprocess.run(
        command, input=json.dumps(message), cwd=root, timeout=2 * TIMEOUT, text=True, capture_output=True
    )
    if done.returncode:
        raise Undelivered(f"{command[0]} ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")


def _path(store: Store, name: str) -> Path:
    return folder_of(store) / f"{_file_name(name)}.json"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:150]
