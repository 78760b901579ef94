"""The command line's entry point: global options, groups of commands, and how errors are shown.

The commands parse and print; the work is in steps/. Each imports what it needs when it is called, so that
`personalize --help` loads Typer and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from personalize_core.cli import (
    analyses,
    concepts,
    exchange,
    external,
    information,
    lineage,
    reporting,
    running,
    sampling,
    steps,
    study,
    tuning,
)
from personalize_core.errors import InputError

app = typer.Typer(
    help="Teach a text-to-image model a concept from a few images, sample it in new scenes, and measure how well.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
for group in (
    concepts,
    running,
    tuning,
    sampling,
    external,
    reporting,
    analyses,
    lineage,
    study,
    exchange,
    information,
):
    app.add_typer(group.app)
app.add_typer(steps.app, name="step")


@app.callback()
def choose_workspace(
    context: typer.Context,
    root: Annotated[Path, typer.Option(help="The workspace: the folder with params.yaml and data/.")] = Path("."),
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Sample and score by this file of data/protocols instead of params.yaml. `personalize protocols` "
            "lists them."
        ),
    ] = None,
) -> None:
    from personalize_core.workspace.store import Store

    context.obj = Store(root.resolve(), protocol)


def main() -> None:
    """The console command.

    Exit status: 0 on success, 2 for wrong input, 1 for a failure with a known cause. Any other exception is a bug and
    keeps its traceback.
    """
    try:
        app()
    except (InputError, FloatingPointError) as error:
        _print_error(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Exception as error:
        from personalize_core.workspace.failures import diagnose

        if not (diagnosis := diagnose(error)):
            raise
        _print_error(diagnosis.sentence)
        sys.exit(1)


def _print_error(sentence: str) -> None:
    print(f"personalize: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    main()
