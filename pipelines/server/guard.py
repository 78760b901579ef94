"""What stands before the Dagster UI: it serves this machine's own pages, and obeys no other page.

Dagster's web server asks nobody who they are. A browser lets any page that its user opens send requests to the
loopback address, and a page whose name is made to point there ("DNS rebinding") can read the replies. So a request must
name an address under which the UI is meant to be found, and must not come from another page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALLOWED_HOSTS = "PERSONALIZE_UI_HOSTS"  # the environment variable with further names, commas between them
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# What a form of another page can send without asking the browser first ("CORS-safelisted" in the Fetch standard).
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")


@dataclass(frozen=True)
class Refusal:
    """Why a request is not served: an HTTP status and a sentence."""

    status: int
    reason: str


class Guard:
    """ASGI middleware that refuses requests of other pages, and forbids other pages to frame the UI.

    Args:
        hosts: names under which the UI may be addressed, besides those of the loopback address.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self.app = app
        self.hosts = LOOPBACK | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # "lifespan" comes from the server itself
            await self.app(scope, receive, send)
            return
        if refusal := self.refusal(scope):
            if scope["type"] == "websocket":  # closed before it is accepted: the client sees HTTP 403
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})
            else:
                await PlainTextResponse(refusal.reason, refusal.status, HEADERS)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why the request of this ASGI scope is refused; None where it is served."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            return Refusal(403, f"The UI is not served as {host!r}; add that name with --allow-host if it is yours.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refusal(403, f"The UI obeys its own pages only, and this request came from {origin!r}.")
        # A browser says where a request comes from also where it sends no Origin, as for an image. Following a link to
        # the UI is allowed; Dagster's pages themselves change nothing.
        from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if from_elsewhere and headers.get("sec-fetch-mode") != "navigate":
            return Refusal(403, "The UI obeys its own pages only, and this request came from another one.")
        if scope["type"] == "http":
            return _refused_by_method(scope, headers)
        return None


def _refused_by_method(scope: Scope, headers: Headers) -> Refusal | None:
    """GET changes nothing, so no link or image can; and no form of another page is taken for a request of the UI."""
    method, path = scope["method"], scope["path"].rstrip("/")
    if path.endswith("/graphql") and method in ("GET", "HEAD"):
        if "query" in parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True):
            return Refusal(405, "Send GraphQL by POST, as application/json.")
    if method not in ("GET", "HEAD", "OPTIONS"):
        content = headers.get("content-type", "text/plain").partition(";")[0].strip().lower()
        if content in FORMS and path.endswith("/graphql"):
            return Refusal(415, "Send GraphQL as application/json.")
    return None


def _name(host: str) -> str:
    """The name of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
