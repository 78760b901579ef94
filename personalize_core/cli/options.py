"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Concept = Annotated[str, typer.Argument(help="The concept's name.")]
Concepts = Annotated[list[str] | None, typer.Argument(help="Names of concepts. Default: all of them.")]
Method = Annotated[str, typer.Option("--method", "-m", help="A method, or METHOD@ABLATION.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", "-m", help="A method, or METHOD@ABLATION. May be repeated. Default: all that params.yaml lists."
    ),
]
Images = Annotated[int, typer.Option(min=1, help="Images per prompt.")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many processes share the work. Default: one per CPU core where the miniature base model runs on a "
        "CPU, otherwise one.",
    ),
]
