"""`python -m pipelines ui`: the Dagster UI over this workspace, ready to use."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from pipelines.server import services
from pipelines.server.guard import ALLOWED_HOSTS

AT_START = 100  # concept folders that are read before the UI starts; the asset `arrival` reads the others

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def pipelines() -> None:
    """Personalize as a Dagster pipeline."""


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Where the UI listens, on the loopback address.")] = 3000,
    gpus: Annotated[int, typer.Option(min=1, help="How many runs may use a graphics card at once.")] = 1,
    home: Annotated[
        Path | None, typer.Option(help="A folder with another dagster.yaml than the one here, as deploy/ray.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name besides those of the loopback address under which a proxy serves the UI. May be repeated."
        ),
    ] = None,
) -> None:
    """Open the Dagster UI with every concept of data/concepts as a partition."""
    if home:
        if not (home / "dagster.yaml").is_file():
            typer.echo(f"personalize: {home} holds no dagster.yaml; give a folder as deploy/ray", err=True)
            raise typer.Exit(2)
        os.environ["DAGSTER_HOME"] = str(home.resolve())
    for name in ("dagster.yaml", "workspace.yaml", "params.yaml"):
        if not Path(name).is_file():
            typer.echo(f"personalize: {name} is not here; run this in the project's folder", err=True)
            raise typer.Exit(2)
    os.environ.setdefault("DAGSTER_HOME", str(Path.cwd()))
    prepare(gpus)
    environment = os.environ | {ALLOWED_HOSTS: ",".join(allow_host or [])}
    # A container often sets it. Each run is a process of its own, which would compile all our sources anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="personalize-") as folder:
        code = services.run(dagster_services(Path(folder), port), environment)
    raise typer.Exit(code)


def dagster_services(folder: Path, port: int) -> list[services.Service]:
    """The code server, Dagster's daemon and the guarded web server, which find the first by its socket in `folder`."""
    socket, workspace = folder / "code.sock", folder / "workspace.yaml"
    workspace.write_text(f"load_from:\n  - grpc_server: {{socket: {socket}, location_name: pipelines}}\n")
    python, found = sys.executable, ["--workspace", str(workspace)]
    serve = ["dagster", "code-server", "start", "--socket", str(socket), "--module-name", "pipelines.definitions"]
    return [
        services.Service("code server", [python, "-m", *serve, "--use-python-environment-entry-point"], False, socket),
        services.Service("daemon", [str(Path(python).with_name("dagster-daemon")), "run", *found]),
        services.Service("web server", [python, "-m", "pipelines.server.webserver", *found, "--port", str(port)]),
    ]


def prepare(gpus: int) -> None:
    """Register what is there, and limit the pool by name: its default limit misses the first runs of an instance."""
    import dagster as dg

    from personalize_core.workspace import arrival
    from pipelines.assets.asset_defaults import GPU
    from pipelines.partitions import CONCEPT
    from pipelines.resources import Workspace

    found = arrival.look(Workspace().store(), most=AT_START)
    for folder in found.values():
        if folder.problem:
            typer.echo(f"personalize: left out: {folder.problem}", err=True)
    good = [name for name, folder in found.items() if not folder.problem]
    home = os.environ.get("DAGSTER_HOME") or str(Path.cwd())  # where dagster.yaml lies
    with dg.DagsterInstance.from_config(home) as instance:
        instance.add_dynamic_partitions(CONCEPT, good)
        instance.event_log_storage.set_concurrency_slots(GPU, gpus)
    typer.echo(f"Concepts: {', '.join(good) or 'none yet; add one with `personalize add`'}")
    typer.echo(f"History is kept in {home}; stop with Ctrl-C.")


if __name__ == "__main__":
    app()
