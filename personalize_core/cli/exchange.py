"""Commands that exchange artifacts and results with other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalize_core.cli.options import Concept, Method
from personalize_core.cli.terminal import print_line, print_paths

app = typer.Typer()


@app.command()
def export(
    context: typer.Context,
    concept: Concept,
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    method: Method,
) -> None:
    """Export an artifact in a format that diffusers loads."""
    from personalize_core import steps

    report = steps.export(context.obj, concept, method, to)
    print_line((report.path / "README.md").read_text())
    print_paths("Files", report.images.items())


@app.command("export-peft")
def export_peft(
    context: typer.Context,
    to: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Export the last comparison as PEFT's result files.

    Each variant and concept becomes a JSON file, VARIANT--CONCEPT.json. docs/reading_peft_results.md says what differs.
    """
    from personalize_core import steps

    report = steps.export_peft(context.obj, to)
    print_paths("Files", report.images.items())


@app.command("import")
def import_(
    context: typer.Context,
    concept: Concept,
    source: Annotated[Path, typer.Argument(help="A safetensors file, or a folder as `export` writes it.")],
    method: Method,
) -> None:
    """Import what another program learned.

    It can be sampled and scored like an artifact trained here. `run` and `train` keep it as it is.
    """
    from personalize_core import steps

    report = steps.import_artifact(context.obj, concept, method, source)
    print_paths("Imported", [(method, report.path)])
