"""A server on this machine that speaks OpenAI's chat completions, says what a test wants, and keeps what it is sent."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "sk-test-0123456789abcdefghijklmnop"


@dataclass(frozen=True)
class Reply:
    """What the server sends back."""

    content: Any = ""  # bytes as they are; a text becomes a chat completion, anything else JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        (message,) = self.body["messages"]
        assert message["role"] == "user"
        return message["content"]

    @property
    def text(self) -> str:
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        found = []
        for part in self.parts:
            if part["type"] == "image_url":
                kind, _, content = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
        return found


def verdict(score: Any, reason: str = "so it looks") -> str:
    return json.dumps({"score": score, "reason": reason})


class Server:
    """Its requests, and what it replies to the next one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[Request] = []
        self.reply: Callable[[int, Request], Reply] = lambda number, request: Reply(verdict(3))
        self.most_at_once = 0
        self._now, self._lock = 0, threading.Lock()

    def handled(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            number = len(self.requests) - 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.reply(number, request)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = server.handled(Request(self.path, dict(self.headers), body))
            content = found.content
            if isinstance(content, str):
                content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            try:
                self.send_response(found.status)
                for name, value in {"Content-Length": str(len(content)), **found.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # whoever asked waits no longer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listening.server_address[1]}/v1")
    threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
