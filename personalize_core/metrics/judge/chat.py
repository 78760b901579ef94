"""A judge behind an address: any server that speaks OpenAI's chat completions.

https://platform.openai.com/docs/api-reference/chat; vLLM, Ollama, llama.cpp and others serve the same.
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from personalize_core.errors import InputError, printable
from personalize_core.files.http import masked, open_exactly
from personalize_core.metrics.judge.keys import key_of
from personalize_core.metrics.judge.questions import Question, Refused, Stopped

ATTEMPTS = 6  # of a question, while the server is busy or does not answer
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds before another attempt, twice as many after each
MOST_BYTES = 2**20  # of a server's reply
BUSY = (408, 409, 425, 429)  # and from 500 on: asked again
ABOUT_THE_QUESTION = (400, 413, 415, 422)  # another image may be answered
ADVICE = {
    401: "it does not accept the key; check {key}",
    402: "it wants a payment; look at the account behind {key}",
    403: "the key may not use this model; look at what the account behind {key} may use",
    404: "there is no such address or model; check judge.address, which mostly ends in /v1, and judge.model",
}


@dataclass(frozen=True)
class ChatJudge:
    """One model of one server.

    The key is read from the environment with each request. It is sent in the header Authorization, to this address
    alone, and is part of nothing that is written.
    """

    address: str
    model: str
    key_variable: str | None
    detail: str | None
    temperature: float | None
    at_once: int
    timeout: float  # seconds
    tries: int = 3
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.model

    @property
    def weights(self) -> str:
        return f"not known; answers of {self.host}"

    @property
    def host(self) -> str:
        return urlsplit(self.address).netloc

    @property
    def answers_depend_on(self) -> Mapping[str, Any]:
        return {
            "address": self.address.rstrip("/"),
            "model": self.model,
            "detail": self.detail,
            "temperature": self.temperature,
        }

    def stop(self) -> None:
        self._stopped.set()

    def ask(self, question: Question) -> str:
        """See `Judge.ask`. A busy server is asked again after a while, as long as its Retry-After says."""
        content = json.dumps(self._request(question)).encode()
        said = ""
        for attempt in range(ATTEMPTS):
            try:
                return _text_of(self._send(content))
            except _Busy as busy:
                said = busy.said
                if attempt + 1 < ATTEMPTS:
                    wait = FIRST_WAIT * 2**attempt * random.uniform(1, 1.25) if busy.wait is None else busy.wait
                    if self._stopped.wait(min(LONGEST_WAIT, wait)):
                        raise Stopped from None
        raise InputError(
            f"the judge at {self.host} gave no answer in {ATTEMPTS} attempts: {said}. Answers so far are kept; run the "
            "same command again later, or lower judge.requests_at_once or raise judge.timeout in params.yaml"
        )

    def _request(self, question: Question) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        for image in question.images:
            url = {"url": f"data:image/png;base64,{base64.b64encode(image.png).decode()}"}
            parts.append({"type": "image_url", "image_url": url | ({"detail": self.detail} if self.detail else {})})
        asked: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": parts}]}
        return asked | ({} if self.temperature is None else {"temperature": self.temperature})

    def _send(self, content: bytes) -> bytes:
        """What the server replies.

        Raises:
            _Busy: it may answer later.
            Refused: it does not answer this question.
            InputError: it answers no question.
        """
        headers, hidden = {"Content-Type": "application/json", "User-Agent": "personalize"}, key_of(self.key_variable)
        if hidden:
            headers["Authorization"] = f"Bearer {hidden}"

        def told(error: object) -> str:
            return printable(masked(" ".join(str(error).split()), [hidden or ""]))[:300]

        request = urllib.request.Request(f"{self.address.rstrip('/')}/chat/completions", content, headers)
        try:
            with open_exactly(request, self.timeout) as reply:
                content = _bounded(reply.read)
                return content.replace(hidden.encode(), b"***") if hidden else content  # a server may repeat it
        except urllib.error.HTTPError as error:
            with error:
                raise self._problem(error.code, error.headers, told(_message_of(error))) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, a connection that broke, no time left
            reason = getattr(error, "reason", None) or error
            raise _Busy(f"{type(error).__name__}: {told(reason)}") from None

    def _problem(self, code: int, headers: Message, said: str) -> Exception:
        if code in BUSY or code >= 500:
            return _Busy(f"HTTP {code}: {said}", _retry_after(headers.get("Retry-After")))
        if code in ABOUT_THE_QUESTION:
            return Refused(f"the judge at {self.host} refused it: HTTP {code}: {said}")
        key = f"the environment's variable {self.key_variable}" if self.key_variable else "judge.key_variable, not set"
        advice = ADVICE.get(code, "")
        if 300 <= code < 400:
            advice = "it redirects, and a key goes nowhere but to its address; write the final one as judge.address"
        # what servers say of a wrong key may repeat a part of it
        words = advice.format(key=key) or said
        return InputError(f"the judge at {self.host} answered HTTP {code}: {words}")


class _Busy(Exception):
    """The server may answer later."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.said = said
        self.wait = wait  # seconds, where the server says them


def _bounded(read: Callable[[int], bytes]) -> bytes:
    content = read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Refused(f"the judge's reply has more than {MOST_BYTES:,} bytes")
    return content


def _text_of(reply: bytes) -> str:
    """The text of the first choice."""
    try:
        message = json.loads(reply)["choices"][0]["message"]
        said = message.get("content")
        if isinstance(said, list):
            said = "".join(part["text"] for part in said if part.get("type") == "text")
        if not said and message.get("refusal"):
            raise Refused(f"the judge refused it: {printable(str(message['refusal']))[:200]}", by_model=True)
        return said if isinstance(said, str) else ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Busy("its reply is no chat completion; does judge.address end where /chat/completions begins?") from None


def _message_of(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal: OpenAI's error.message, or the beginning of whatever it sends."""
    try:
        content = error.read(4_000)
    except (OSError, http.client.HTTPException):
        return "no explanation"
    try:
        found = json.loads(content)
        found = found.get("error", found)
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return content.decode(errors="replace").strip() or "no explanation"


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a number of them or of a date (RFC 9110, sec. 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else _until(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
