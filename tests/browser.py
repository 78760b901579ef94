"""A real browser without a network, for pages that must need none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
needed = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed: nobody has opened the page in a browser here"
)
PATIENCE = 600_000  # ms; a busy machine is no fault of the page
expect.set_options(timeout=PATIENCE)  # which else gives up after five seconds


@contextmanager
def running(*options: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # as root, in containers, Chromium runs only without its sandbox; it opens nothing but our own page
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *options], timeout=PATIENCE)
        yield browser
        browser.close()


def watched(context: BrowserContext) -> Iterator[BrowserContext]:
    """A context in which no page may fail, complain or ask for anything outside its own file."""
    asked: list[str] = []
    said: list[str] = []
    context.set_default_timeout(PATIENCE)
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda message: said.append(message.text))
    context.on("weberror", lambda error: said.append(str(error.error)))
    yield context
    context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert not said


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2.2 defines it: from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
