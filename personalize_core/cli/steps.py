"""The `step` commands: one step over every concept. The stages of dvc.yaml run these."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from personalize_core.cli import external, reporting
from personalize_core.cli.cells import each, over_concepts
from personalize_core.cli.options import Method
from personalize_core.cli.terminal import progress

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

app = typer.Typer(help="Run one step over every concept, as dvc.yaml does.", no_args_is_help=True)


@app.command("encode-images")
def encode_images(context: typer.Context) -> None:
    """Encode the concept images to latents."""
    from personalize_core import steps

    over_concepts(context.obj, steps.encode_images)


@app.command("class-images")
def class_images(context: typer.Context) -> None:
    """Sample class images, where a method needs them."""
    from personalize_core import steps

    store: Store = context.obj
    if steps.class_images_wanted(store):
        nouns = sorted({store.concept(name).class_noun for name in store.concept_names()})
        each(nouns, [partial(steps.make_class_images, store, noun) for noun in nouns])


@app.command()
def train(context: typer.Context, method: Method) -> None:
    """Train one method."""
    from personalize_core import steps

    over_concepts(context.obj, steps.train, method)


@app.command()
def sample(context: typer.Context, method: Method) -> None:
    """Sample the image grids of one method."""
    from personalize_core import steps

    over_concepts(context.obj, steps.sample_grid, method)


@app.command()
def score(context: typer.Context, method: Method) -> None:
    """Score the image grids of one method."""
    from personalize_core import steps

    over_concepts(context.obj, steps.score, method)


@app.command("score-references")
def score_references(context: typer.Context) -> None:
    """Score the concept images with each other."""
    from personalize_core import steps

    over_concepts(context.obj, steps.score_references)


@app.command("score-external")
def score_external(context: typer.Context) -> None:
    """Score the external columns."""
    external.score_registered(context.obj)


@app.command()
def compare(context: typer.Context) -> None:
    """Compare everything that was scored."""
    reporting.compare(context)


@app.command()
def report(context: typer.Context) -> None:
    """Write the report of the present comparison."""
    from personalize_core import steps

    with progress() as listener:
        made = steps.report(context.obj, listener)
    reporting.print_report(made)
