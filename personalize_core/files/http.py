"""Requests to an address that somebody configured: they go there, or nowhere, and secrets stay out of messages."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def open_exactly(request: urllib.request.Request, timeout: float) -> Any:
    """`urllib.request.urlopen`, without following redirects; and without a proxy for plain http on this machine.

    A proxy would be sent what does not leave the machine, a key among it, in clear.

    Raises:
        urllib.error.HTTPError: the answer's status is no success; a redirect is none.
        OSError: there is no answer.
    """
    parts = urlsplit(request.full_url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK
    handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if local else [])]
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout)


def masked(text: str, secrets: Iterable[str]) -> str:
    """The text with *** for each secret. Cut a text only after this: the beginning of a secret is found no more."""
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object, **named: object) -> None:
        return None
