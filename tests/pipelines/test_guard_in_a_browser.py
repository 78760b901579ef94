"""A page of another site, opened in a real browser, reaches nothing that stands behind the guard; the own page does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import uvicorn
from playwright.sync_api import Browser
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from pipelines.server.guard import Guard
from tests import browser as browsers

pytestmark = browsers.needed

# Each way in which a page can send something without being allowed to, and what became of it.
ATTACK = """
<body><script>
const ui = "%(ui)s", mutation = JSON.stringify({query: "mutation {launchRun}"}), url = ui + "/graphql";
const by_get = url + "?query=" + encodeURIComponent("mutation {launchRun}");
const settled = promise => promise.then(found => "answered " + found, () => "refused");
const loaded = (tag, name, value) => new Promise((well, ill) => {
  const element = document.createElement(tag);
  element.onload = () => well("loaded");
  element.onerror = ill;
  element[name] = value;
  document.body.append(element);
});
const socket = () => new Promise((well, ill) => {
  const opened = new WebSocket(url.replace("http", "ws"));
  opened.onopen = () => well("opened");
  opened.onerror = ill;
});
const form = () => new Promise(well => {
  document.body.insertAdjacentHTML("beforeend", `<iframe name=into></iframe>
    <form action="${url}" method=post enctype="text/plain" target=into><input name='%(field)s' value='"}'></form>`);
  document.querySelector("iframe").onload = () => well("sent");
  document.querySelector("form").submit();
});
const read = (where, options) => fetch(where, options).then(reply => reply.text());
const every = () => Promise.all([
  settled(loaded("img", "src", by_get)),
  settled(loaded("script", "src", by_get)),
  settled(read(by_get)),
  settled(read(by_get, {mode: "no-cors"}).then(text => { if (!text) throw 0; })),
  settled(read(url, {method: "POST", body: mutation, headers: {"content-type": "application/json"}})),
  settled(read(url, {method: "POST", body: mutation, mode: "no-cors"}).then(text => { if (!text) throw 0; })),
  settled(socket()),
]);
</script>
"""


class Site:
    """A server on a port of its own, until the test ends."""

    def __init__(self, app) -> None:
        self.server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error"))
        self.started = threading.Event()
        startup = self.server.startup

        async def told(sockets=None) -> None:
            await startup(sockets=sockets)
            self.started.set()

        self.server.startup = told
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.started.wait()
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def reached() -> list[str]:
    """What passed the guard, in order."""
    return []


@pytest.fixture
def ui(reached: list[str]) -> Iterator[Site]:
    async def page(request: Request) -> HTMLResponse:
        reached.append(f"{request.method} {request.url.path}")
        return HTMLResponse("<title>the UI</title>")

    async def graphql(request: Request) -> JSONResponse:
        reached.append(f"{request.method} {request.url.path}")
        return JSONResponse({"data": "launched"})

    async def socket(websocket: WebSocket) -> None:
        reached.append("websocket")
        await websocket.accept()
        await websocket.receive()

    routes = [
        Route("/graphql", graphql, methods=["GET", "POST"]),
        WebSocketRoute("/graphql", socket),
        Route("/{path:path}", page, methods=["GET", "POST"]),
    ]
    site = Site(Guard(Starlette(routes=routes)))
    yield site
    site.end()


@pytest.fixture
def evil(ui: Site) -> Iterator[Site]:
    async def page(request: Request) -> HTMLResponse:
        field = '{"query": "mutation {launchRun}", "x": "'
        return HTMLResponse(ATTACK % {"ui": f"http://127.0.0.1:{ui.port}", "field": field})

    site = Site(Starlette(routes=[Route("/", page)]))
    yield site
    site.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One that looks up evil.example on this machine, as a name server of its owner would tell it to."""
    with browsers.running("--host-resolver-rules=MAP evil.example 127.0.0.1") as opened:
        yield opened


def test_no_request_of_another_site_reaches_the_ui(browser, ui, evil, reached):
    page = browser.new_page()
    page.goto(f"http://evil.example:{evil.port}/")
    assert set(page.evaluate("every()")) == {"refused"}
    assert page.evaluate("form()") == "sent"
    assert reached == []


def test_a_name_that_is_made_to_point_here_reads_nothing(browser, ui, reached):
    page = browser.new_page()
    reply = page.goto(f"http://evil.example:{ui.port}/")
    assert reply.status == 403 and "not served as" in page.content() and reached == []


def test_no_other_site_shows_the_ui_in_a_frame(browser, ui, evil, reached):
    page = browser.new_page()
    page.goto(f"http://evil.example:{evil.port}/")
    page.evaluate(f"loaded('iframe', 'src', 'http://127.0.0.1:{ui.port}/')")
    assert len(page.frames) == 2 and "the UI" not in page.frames[1].title()


def test_the_own_page_asks_by_post_and_by_websocket(browser, ui, reached):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{ui.port}/runs")
    asked = """() => fetch("/graphql", {method: "POST", body: "{}", headers: {"content-type": "application/json"}})
        .then(reply => reply.text())"""
    assert page.evaluate(asked) == '{"data":"launched"}'
    opened = """() => new Promise(well => {
        const socket = new WebSocket(location.origin.replace("http", "ws") + "/graphql");
        socket.onopen = () => well("opened");
    })"""
    assert page.evaluate(opened) == "opened"
    assert [what for what in reached if "favicon" not in what] == ["GET /runs", "POST /graphql", "websocket"]
