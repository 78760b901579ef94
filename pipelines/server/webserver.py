"""`python -m pipelines.server.webserver`: Dagster's own web server, with `Guard` before it.

Takes the options of `dagster-webserver`. Names under which the UI may be addressed besides those of the loopback
address come from the environment variable PERSONALIZE_UI_HOSTS, with commas between them.
"""

from __future__ import annotations

import os

import dagster_webserver.app
from dagster_webserver.cli import cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from pipelines.server.guard import ALLOWED_HOSTS, Guard


class GuardedWebserver(DagsterWebserver):
    """Dagster's web server; whatever reaches it has passed the guard."""

    def build_middleware(self) -> list[Middleware]:
        hosts = [host for host in os.environ.get(ALLOWED_HOSTS, "").split(",") if host]
        return [Middleware(Guard, hosts=hosts), *super().build_middleware()]


def main() -> None:
    # Dagster's command has no option for a middleware; it makes the application from this name.
    dagster_webserver.app.DagsterWebserver = GuardedWebserver
    cli()


if __name__ == "__main__":
    main()
