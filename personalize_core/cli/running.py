"""Commands that train, sample and score: everything that is not up to date, or a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from personalize_core.cli.cells import over_cells, print_notices
from personalize_core.cli.options import Concepts, Methods, Processes
from personalize_core.cli.reporting import print_comparison, print_report
from personalize_core.cli.terminal import print_line, print_paths, print_table, progress

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

app = typer.Typer()

DEMO = ("backpack1", "teapot1")  # two of the concepts that come with the project
# of the baseline and of each kind of method one: an embedding, weights of the U-Net, modules added to it
DEMO_METHODS = ("base_model", "textual_inversion", "dreambooth", "personalized_residuals")


@app.command()
def run(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Do everything that is not up to date.

    Trains, samples, scores and compares, and writes the report.
    """
    from personalize_core import steps

    store: Store = context.obj
    over_cells(store, concepts, methods, (steps.train, steps.sample_grid, steps.score), processes, references=True)
    with progress() as listener:
        compared, report = steps.compare(store, listener), steps.report(store, listener)
    print_comparison(store, compared)
    print_report(report)


@app.command()
def train(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Train methods on concepts."""
    from personalize_core import steps

    over_cells(context.obj, concepts, methods, [steps.train], processes)


@app.command()
def evaluate(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Sample image grids of trained concepts, and score them.

    The prompts are those of params.yaml, or of the protocol.
    """
    from personalize_core import steps

    over_cells(context.obj, concepts, methods, [steps.sample_grid, steps.score], processes, references=True)


@app.command()
def repeat(
    context: typer.Context,
    concepts: Concepts = None,
    methods: Methods = None,
    times: Annotated[int, typer.Option(min=1, help="How many more trainings, each with another seed.")] = 2,
    processes: Processes = None,
) -> None:
    """Train again with other seeds, and compare.

    Shows how much of a difference between methods is the noise of training.
    """
    from personalize_core import steps
    from personalize_core.methods import BASELINE

    store: Store = context.obj
    methods = methods or [name for name in store.params.method_names if name != BASELINE]
    if not concepts:
        steps.check_concepts_wanted(store)
        concepts = steps.concepts_wanted(store)
    steps.check_repeatable(store, concepts, methods)
    chain = (steps.train, steps.sample_grid, steps.score)
    over_cells(store, concepts, methods, chain, processes, references=True)
    for number in range(1, times + 1):
        again = store.again(number)
        print_line(f"Trained again with seed {again.training_seed}, and sampled from the same initial noise:")
        over_cells(again, concepts, methods, chain, processes)
    with progress() as listener:
        compared = steps.compare(store, listener)
    print_comparison(store, compared)


@app.command()
def demo(context: typer.Context, processes: Processes = None) -> None:
    """Run two of the project's own concepts by three methods.

    The baseline, the base model alone, is sampled and scored too.
    """
    run(context, list(DEMO), list(DEMO_METHODS), processes)


@app.command()
def plan(context: typer.Context, concepts: Concepts = None, methods: Methods = None) -> None:
    """List what `run` would do, and why.

    Changes nothing. The nightly schedule of the pipeline uses the same list.
    """
    from personalize_core import steps

    if not concepts:
        steps.check_concepts_wanted(context.obj)
    cells = steps.plan(context.obj, concepts, methods)
    if cells:
        print_table(
            ("Concept", "Method", "From", "Why"), [(cell.concept, cell.method, cell.first, cell.why) for cell in cells]
        )
        print_notices(context.obj, cells)
    else:
        print_line("Everything is up to date.")


@app.command()
def check(context: typer.Context, concepts: Concepts = None, methods: Methods = None) -> None:
    """List everything that is wrong with the inputs.

    Looks at params.yaml, the concepts, prompts, protocols and encoders, and asks the base model what only it can tell.
    Trains and samples nothing. Every command that trains, DVC and the pipeline make the same checks first.
    """
    from personalize_core import steps
    from personalize_core.concepts.doubts import doubts
    from personalize_core.errors import together

    store: Store = context.obj
    if problems := steps.problems_of_workspace(store, concepts, methods):
        raise together(problems)
    plan = steps.plan(store, concepts, methods)
    print_line("Nothing is wrong.")
    if plan:
        print_line(f"To do: {steps.estimate(store, plan).in_words(store)}.")
    for concept in concepts or steps.concepts_wanted(store):
        for doubt in doubts(store.concept_folder(concept)):
            print_line(f"Worth a look, of {concept}: {doubt}.")


@app.command()
def canary(
    context: typer.Context,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the scores of the last run: later runs are compared with them.")
    ] = False,
) -> None:
    """Check whether a package upgrade changes scores.

    Runs the concepts and methods of automation.canary in params.yaml again, in a folder of their own. The exit status
    is 1 if a score changed by more than the noise of training.
    """
    from personalize_core import steps

    store: Store = context.obj
    if accept:
        steps.accept_canary(store)
        print_line("Accepted: later runs are compared with the scores of the last run.")
        return
    print_line(f"Since the last run: {steps.why_canary(steps.upgrades(store)) or 'no package was upgraded'}")
    with progress() as listener:
        report = steps.run_canary(store, listener)
    changed = steps.moved(store)
    for sentence in changed:
        print_line(f"CHANGED  {sentence}")
    print_line("Scores changed." if changed else "No score changed.")
    print_paths("Scores", [("of each concept and method", report.path)])
    if changed:
        raise typer.Exit(1)
