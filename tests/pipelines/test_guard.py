"""The UI serves its own pages and obeys no other page."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from pipelines.server.guard import HEADERS, Guard
from pipelines.server.webserver import GuardedWebserver

MUTATION = "/graphql?query=mutation%20%7BlaunchRun%7D"


async def reply(request) -> PlainTextResponse:
    return PlainTextResponse("served")


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("served")
    await socket.close()


@pytest.fixture()
def client() -> TestClient:
    routes = [
        Route("/graphql", reply, methods=["GET", "POST"]),
        Route("/{path:path}", reply, methods=["GET", "POST"]),
        WebSocketRoute("/graphql", echo),
    ]
    app = Guard(Starlette(routes=routes), hosts=["lab.example"])
    return TestClient(app, base_url="http://127.0.0.1:3000")


@pytest.mark.parametrize("host", ["127.0.0.1:3000", "localhost:3000", "[::1]:3000", "LOCALHOST", "lab.example"])
def test_its_own_names_are_served(client, host):
    served = client.get("/runs", headers={"host": host})
    assert (served.status_code, served.text) == (200, "served")
    assert {name: served.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:3000", "localhost.evil.example", "10.0.0.1:3000", "", "[", "a@b"]
)
def test_another_name_is_refused_as_after_dns_rebinding(client, host):
    refused = client.get("/graphql", headers={"host": host})
    assert refused.status_code == 403 and "--allow-host" in refused.text
    assert refused.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:3001", "http://localhost:3000", ""]
)
def test_a_request_of_another_page_is_refused(client, origin):
    refused = client.post("/graphql", json={"query": "{version}"}, headers={"origin": origin})
    assert refused.status_code == 403 and "its own pages only" in refused.text
    with pytest.raises(WebSocketDisconnect):
        with client.websocket_connect("/graphql", headers={"host": "127.0.0.1:3000", "origin": origin}):
            pass


def test_its_own_page_and_a_program_that_is_no_browser_are_served(client):
    for headers in ({"origin": "http://127.0.0.1:3000"}, {}):
        assert client.post("/graphql", json={"query": "{version}"}, headers=headers).text == "served"
        with client.websocket_connect("/graphql", headers={"host": "127.0.0.1:3000", **headers}) as socket:
            assert socket.receive_text() == "served"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_an_image_of_another_page_starts_nothing_and_a_link_leads_to_the_ui(client, site):
    image = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
    assert client.get("/graphql", headers=image).status_code == 403
    assert client.get("/runs", headers=link).status_code == 200
    assert client.get(MUTATION, headers=link).status_code == 405


def test_graphql_by_get_is_refused_and_the_page_to_type_it_is_served(client):
    assert client.get(MUTATION).status_code == 405
    assert client.get("/graphql?query").status_code == 405
    assert client.get("/graphql/?query=%7Bversion%7D").status_code == 405
    assert client.head(MUTATION).status_code == 405
    assert client.get("/graphql").status_code == 200


@pytest.mark.parametrize(
    "content", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_form_is_not_taken_for_graphql(client, content):
    refused = client.post("/graphql", content=b'{"query": "{version}"}', headers={"content-type": content})
    assert refused.status_code == 415
    assert client.post("/graphql", content=b"{}").status_code == 415  # no type is text/plain to a browser


def test_dagsters_web_server_is_behind_the_guard(monkeypatch):
    """The one name of Dagster's that `pipelines.server.webserver` replaces is still the one its command uses."""
    import dagster_webserver.app
    from dagster_webserver.webserver import DagsterWebserver

    assert dagster_webserver.app.DagsterWebserver is DagsterWebserver
    monkeypatch.setenv("PERSONALIZE_UI_HOSTS", "lab.example,other.example")
    middleware = GuardedWebserver(None, "").build_middleware()  # type: ignore[arg-type]
    assert middleware[0].cls is Guard
    assert middleware[0].kwargs == {"hosts": ["lab.example", "other.example"]}
