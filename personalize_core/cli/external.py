"""The command that scores images made elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalize_core.cli.cells import each
from personalize_core.errors import InputError, shown

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

app = typer.Typer()


@app.command()
def score(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A folder with images and what they were made from. It is only read. Without it, every "
            "external column of the workspace is scored again as far as it is not up to date."
        ),
    ] = None,
    concept: Annotated[str | None, typer.Option(help="The concept that the images show.")] = None,
    label: Annotated[str | None, typer.Option("--as", help="The column's label in tables and figures.")] = None,
    layout: Annotated[str | None, typer.Option(help="How the folder is laid out. Default: found by its files.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE, an option of the layout. May be repeated.")
    ] = None,
    mention: Annotated[
        str | None,
        typer.Option(
            help="What stands for the concept in the prompts, such as 'sks dog'. Default: the placeholder or "
            "the class noun."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What made the images, such as 'FLUX.1-dev, LoRA of ai-toolkit'.")
    ] = None,
) -> None:
    """Score images that another program made.

    They become a column of the comparison, beside the methods. The folder holds a manifest (prompts.csv or
    prompts.jsonl: file, prompt, seed), images named PROMPTINDEX_SEED.png with prompts.txt, or what a known program
    writes. docs/score_other_images.md lists the layouts.
    """
    from personalize_core import steps
    from personalize_core.workspace.external_columns import ExternalColumn

    if folder is None:
        score_registered(context.obj)
        return
    if not concept or not label:
        raise InputError("say which concept the images show and what to call them: --concept NAME --as LABEL")
    store: Store = context.obj
    column = ExternalColumn(
        folder=_named(store, folder), layout=layout, options=_options(options or []), mention=mention, source=source
    )
    steps.add_external(store, label, concept, column)
    each([f"{label}, {concept}"], [partial(steps.score_external, store, concept, label)])
    each([f"real images, {concept}"], [partial(steps.score_references, store, concept)])


def score_registered(store: Store) -> None:
    """Score every external column of the workspace."""
    from personalize_core import steps
    from personalize_core.workspace.external_columns import registered

    columns = registered(store)
    store.external_columns.mkdir(parents=True, exist_ok=True)  # DVC wants it, also where there are no columns
    names = [f"{label}, {concept}" for label, concept in columns]
    each(names, [partial(steps.score_external, store, concept, label) for label, concept in columns])


def _named(store: Store, folder: Path) -> str:
    """As the column's description names it: relative to the workspace if it lies there."""
    path = folder.expanduser().resolve()
    return str(path.relative_to(store.root)) if path.is_relative_to(store.root) else str(path)


def _options(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if wrong := [one for one, (name, mark, _) in zip(given, pairs, strict=True) if not name or not mark]:
        raise InputError(f"--option {shown(wrong[0])}: write it as NAME=VALUE")
    return {name: value for name, _, value in pairs}
