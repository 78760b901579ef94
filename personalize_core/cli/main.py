"""The command line: parsing and tables. What is done is done in steps/."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from personalize_core import steps
from personalize_core.base_model import loading
from personalize_core.cli import analyses as analyses
from personalize_core.cli import lineage as lineage
from personalize_core.cli import study as study
from personalize_core.cli.terminal import console, new_table, progress, short, show
from personalize_core.concepts import intake
from personalize_core.errors import InputError
from personalize_core.methods import BASELINE
from personalize_core.steps.processes import in_turn, shared_out
from personalize_core.workspace.failures import diagnose
from personalize_core.workspace.store import Store

CELL = (steps.train, steps.sample_grid, steps.score)  # what is made of a concept by a method
DEMO = ("backpack1", "teapot1")  # two of the concepts that come with the project
DEMO_METHODS = ("base_model", "textual_inversion", "dreambooth", "personalized_residuals")  # a word, weights, modules

app = typer.Typer(
    help="Teach a text-to-image model a concept from a few images, sample it in new scenes, and measure how well.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
step = typer.Typer(help="One step over every concept: what dvc.yaml runs.", no_args_is_help=True)
app.add_typer(step, name="step")
app.add_typer(study.app)
app.add_typer(analyses.app)
app.add_typer(lineage.app)

Concepts = Annotated[list[str] | None, typer.Argument(help="Names of concepts; all of them if none is given.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", "-m", help="A method, or METHOD@ABLATION; may be repeated. All of params.yaml if none is given."
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many processes share the work. If not given: one, which has the device to itself; where the "
        "miniature computes on a CPU, one for each core.",
    ),
]
OneMethod = Annotated[str, typer.Option("--method", "-m", help="A method, or METHOD@ABLATION.")]


@app.callback()
def choose_workspace(
    context: typer.Context,
    root: Annotated[Path, typer.Option(help="The workspace: the folder with params.yaml and data/.")] = Path("."),
    protocol: Annotated[
        str | None,
        typer.Option(help="Draw and score by a file of data/protocols, not by params.yaml; `protocols` lists them."),
    ] = None,
) -> None:
    context.obj = Store(root.resolve(), protocol)


@app.command()
def add(
    context: typer.Context,
    photos: Annotated[Path, typer.Argument(help="A folder with the concept's images; it is only read.")],
    class_noun: Annotated[str, typer.Option(help="What kind of thing it is: dog, mug, 'stuffed animal'.")],
    name: Annotated[str | None, typer.Option(help="The concept's name; the folder's own if not given.")] = None,
) -> None:
    """Check concept images and add them as a concept."""
    store: Store = context.obj
    concept = intake.add_concept(store.concepts, photos, class_noun, name)
    folder = store.concept_folder(concept.name)
    console.print(f"Added {concept.name}: write {concept.placeholder} for it in prompts.")
    show("Concept images", [(path.name, path) for path in intake.concept_images(folder)])


@app.command()
def train(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Let methods learn concepts."""
    _over_cells(context.obj, concepts, methods, [steps.train], processes)


@app.command()
def evaluate(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Draw every trained concept in the prompts of params.yaml, and score the images."""
    _over_cells(context.obj, concepts, methods, [steps.sample_grid, steps.score], processes, references=True)


@app.command()
def compare(context: typer.Context) -> None:
    """Compare everything that has been scored: one table, grids and plots."""
    with progress() as listener:
        report = steps.compare(context.obj, listener)
    _show_comparison(context.obj, report)


@app.command()
def report(context: typer.Context) -> None:
    """Compare everything that has been scored, and tell of it in one page that needs nothing else."""
    with progress() as listener:
        steps.compare(context.obj, listener)
        made = steps.report(context.obj, listener)
    _show_report(made)


@app.command()
def run(
    context: typer.Context, concepts: Concepts = None, methods: Methods = None, processes: Processes = None
) -> None:
    """Everything that is not up to date: train, draw, score, compare, report."""
    store: Store = context.obj
    _over_cells(store, concepts, methods, CELL, processes, references=True)
    with progress() as listener:
        compared, told = steps.compare(store, listener), steps.report(store, listener)
    _show_comparison(store, compared)
    _show_report(told)


@app.command()
def plan(context: typer.Context, concepts: Concepts = None, methods: Methods = None) -> None:
    """List what `run` would make, and why; it does nothing. The nightly schedule goes by the same list."""
    if not concepts:
        steps.check_concepts_wanted(context.obj)
    cells = steps.plan(context.obj, concepts, methods)
    table = new_table("Concept", "Method", "From", "Why")
    for cell in cells:
        table.add_row(cell.concept, cell.method, cell.first, cell.why)
    console.print(table if cells else "Everything is up to date.")


@app.command()
def canary(
    context: typer.Context,
    accept: Annotated[bool, typer.Option("--accept", help="Compare later runs with the last one from now on.")] = False,
) -> None:
    """Run the cells of params.yaml (automation.canary) again, apart from all results: did an upgrade move a score?"""
    store: Store = context.obj
    if accept:
        steps.accept_canary(store)
        console.print("Later runs are compared with the last one.")
        return
    console.print(
        f"Since the last run: {steps.why_canary(steps.upgrades(store)) or 'no package was upgraded'}", markup=False
    )
    with progress() as listener:
        made = steps.run_canary(store, listener)
    for sentence in steps.moved(store):
        console.print(f"MOVED  {sentence}", markup=False, highlight=False)
    console.print("Scores moved." if steps.moved(store) else "No score moved.")
    show("Scores", [("of each cell", made.path)])
    if steps.moved(store):
        raise typer.Exit(1)


@app.command()
def repeat(
    context: typer.Context,
    concepts: Concepts = None,
    methods: Methods = None,
    times: Annotated[int, typer.Option(min=1, help="How often to train again, each time with another seed.")] = 2,
    processes: Processes = None,
) -> None:
    """Train methods again with other seeds, to see what of a difference is the noise of training; then compare."""
    store: Store = context.obj
    methods = methods or [name for name in store.params.method_names if name != BASELINE]
    if not concepts:
        steps.check_concepts_wanted(store)
        concepts = steps.concepts_wanted(store)
    steps.check_repeatable(store, concepts, methods)
    _over_cells(store, concepts, methods, CELL, processes, references=True)
    for number in range(1, times + 1):
        console.print(f"Trained again with seed {store.again(number).training_seed}, and drawn from the same noise")
        _over_cells(store.again(number), concepts, methods, CELL, processes)
    compare(context)


@app.command()
def demo(context: typer.Context, processes: Processes = None) -> None:
    """The whole chain on two concepts that come with the project, by three methods and the base model alone."""
    run(context, list(DEMO), list(DEMO_METHODS), processes)


@app.command()
def sample(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(help="The concept's name.")],
    prompt: Annotated[list[str], typer.Option(help="With the placeholder, as 'a photo of <dog7>'. May be repeated.")],
    method: OneMethod,
    variant: Annotated[str | None, typer.Option(help="A sampling variant of params.yaml.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
) -> None:
    """Draw a trained concept in prompts of your own."""
    with progress() as listener:
        report = steps.sample_prompts(context.obj, concept, method, prompt, images, variant, listener)
    show("Images", list(report.images.items()))


@app.command("heat-maps")
def heat_maps(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(help="The concept's name.")],
    prompt: Annotated[str, typer.Option(help="With the placeholder, as 'a photo of <dog7> in the jungle'.")],
    method: OneMethod,
    image: Annotated[int, typer.Option(min=0, help="Which image of the prompt: another has another noise.")] = 0,
) -> None:
    """Show where an image's attention looked for each word, for every sampling variant of params.yaml."""
    with progress() as listener:
        report = steps.heat_maps(context.obj, concept, method, prompt, image, listener)
    show("Images", list(report.images.items()))


@app.command()
def together(
    context: typer.Context,
    concepts: Annotated[
        list[str], typer.Argument(help="Names of two or more concepts; NAME:METHOD where it is not that of --method.")
    ],
    prompt: Annotated[
        list[str], typer.Option(help="With every placeholder, as 'a photo of <dog7> next to <mug>'. May be repeated.")
    ],
    method: OneMethod = "personalized_residuals",
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
) -> None:
    """Draw several trained concepts in one image, each confined to where its own words are looked at."""
    with progress() as listener:
        cells = [_cell(word, method) for word in concepts]
        report = steps.sample_several_concepts(context.obj, cells, prompt, images, listener)
    table = new_table("Identity (DINO) of the part of", *(f"with {name}" for name, _ in cells))
    for part, _ in cells:
        table.add_row(part, *(f"{report.metrics[f'{part}.{name}']:.3f}" for name, _ in cells))
    console.print(table)
    show("Images", list(report.images.items()))


@app.command()
def export(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(help="The concept's name.")],
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    method: OneMethod,
) -> None:
    """Write what was learned in the format that stock diffusers loads."""
    report = steps.export(context.obj, concept, method, to)
    console.print((report.path / "README.md").read_text(), markup=False)
    show("Files", list(report.images.items()))


@app.command("import")
def import_(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(help="The concept's name.")],
    source: Annotated[Path, typer.Argument(help="A safetensors file, or a folder, as `export` writes it.")],
    method: OneMethod,
) -> None:
    """Take over what another program learned, to draw and score it; `run` trains it no more."""
    report = steps.import_artifact(context.obj, concept, method, source)
    show("Imported", [(method, report.path)])


@app.command("base-models")
def base_models() -> None:
    """List the base models that are known by name."""
    table = new_table("Name", "Where from", "Revision", "What it is")
    table.add_row("mini", "comes with this package", "-", "64 px, predicts noise; a drawn world")
    for name, published in loading.PUBLISHED.items():
        table.add_row(name, published.hub_id, published.revision[:12], published.note)
    console.print(table)
    console.print(
        "Choose one in params.yaml with base_model. A folder in diffusers' layout, or ORGANIZATION/NAME@COMMIT on the "
        "hub, can stand there too."
    )


@app.command()
def protocols(context: typer.Context) -> None:
    """List the protocols that --protocol knows: what each draws, and where it comes from."""
    store: Store = context.obj
    table = new_table("Name", "Protocol", "Concepts", "Prompts", "Images each", "Sampler", "Encoders", "Source")
    for name in store.protocol_names():
        protocol = replace(store, protocol=name).described_protocol
        assert protocol
        lists = protocol.collection or ", ".join(each.name for each in protocol.prompts)
        noise = f", eta {protocol.eta:g}" if protocol.eta else ""
        sampler = f"{protocol.sampler} {protocol.steps}, guidance {protocol.guidance:g}{noise}"
        encoders = protocol.encoders or store.params.encoders
        measured = ", ".join(filter(None, [*encoders.text_image, *encoders.identity, encoders.segmenter]))
        concepts = "those of its lists" if protocol.collection else len(protocol.concepts) or "all of the workspace"
        images = protocol.images_per_prompt
        table.add_row(name, protocol.title, str(concepts), lists, str(images), sampler, measured, protocol.source)
    console.print(table)
    console.print("What is uncertain about each stands in its file, in data/protocols.")


@step.command("encode-images")
def step_encode_images(context: typer.Context) -> None:
    """Concept images to latents."""
    _over_concepts(context.obj, steps.encode_images)


@step.command("class-images")
def step_class_images(context: typer.Context) -> None:
    """Images of every class noun, where a method of params.yaml asks for them."""
    store: Store = context.obj
    if steps.class_images_wanted(store):
        nouns = sorted({store.concept(name).class_noun for name in store.concept_names()})
        _each(nouns, [partial(steps.make_class_images, store, noun) for noun in nouns])


@step.command("train")
def step_train(context: typer.Context, method: OneMethod) -> None:
    """What one method learns about every concept."""
    _over_concepts(context.obj, steps.train, method)


@step.command("draw")
def step_sample(context: typer.Context, method: OneMethod) -> None:
    """Every concept's grid by one method."""
    _over_concepts(context.obj, steps.sample_grid, method)


@step.command("score")
def step_score(context: typer.Context, method: OneMethod) -> None:
    """The scores of one method's grids."""
    _over_concepts(context.obj, steps.score, method)


@step.command("score-references")
def step_score_references(context: typer.Context) -> None:
    """The concept images, scored against each other."""
    _over_concepts(context.obj, steps.score_references)


@step.command("compare")
def step_compare(context: typer.Context) -> None:
    """One table over everything that has been scored."""
    compare(context)


@step.command("report")
def step_report(context: typer.Context) -> None:
    """The page about the comparison that there is."""
    with progress() as listener:
        made = steps.report(context.obj, listener)
    _show_report(made)


# Running


def _cell(word: str, method: str) -> tuple[str, str]:
    """Concept and method of NAME:METHOD, or of NAME alone with the method that all have."""
    name, mark, own = word.partition(":")  # no name has a colon
    return name, own if mark else method


def _over_cells(
    store: Store,
    concepts: list[str] | None,
    methods: list[str] | None,
    what: Sequence[Callable],
    processes: int | None,
    references: bool = False,
) -> None:
    """Steps over concepts and methods, after a look at every input: a mistake ends the run before any training."""
    methods = methods or store.params.method_names
    if not concepts:
        steps.check_concepts_wanted(store)
        concepts = steps.concepts_wanted(store)
    steps.check_inputs(store, concepts, methods)
    cells = [(concept, method) for concept in concepts for method in methods]
    tasks = [partial(in_turn, what, store, concept, method) for concept, method in cells]
    if references:
        tasks += [partial(in_turn, [steps.score_references], store, concept) for concept in concepts]
    processes = _processes(store, processes, concepts, methods)
    table = new_table("Concept", "Method", "State", "Loss on a fixed batch, and its fall [95 %]", "Images")
    with progress() as listener:
        reports = [done() for done in shared_out(tasks, processes, listener)]
    for (concept, method), made in zip(cells, reports, strict=False):  # behind them come the references
        table.add_row(*_row(concept, method, made))
    console.print(table)


def _processes(store: Store, asked: int | None, concepts: list[str], methods: list[str]) -> int:
    """No more than there is to do, for each takes seconds to start."""
    cells = len(steps.plan(store, concepts, methods))
    return min(cells, asked or steps.processes_of(store)) if cells > 1 else 1


def _over_concepts(store: Store, one: Callable, *method: str) -> None:
    steps.check_concepts_wanted(store)
    steps.check_inputs(store, [], store.params.method_names)
    concepts = steps.concepts_wanted(store)
    processes = _processes(store, None, concepts, list(method)) if method else 1
    _each(concepts, [partial(one, store, concept, *method) for concept in concepts], processes)


def _each(names: list[str], tasks: Sequence[Callable[[steps.Listener], steps.Report]], processes: int = 1) -> None:
    """A task for each name; what is wrong with one stops no other, and the command fails at the end."""
    failed = []
    with progress() as listener:
        for name, done in zip(names, shared_out(tasks, processes, listener), strict=True):
            try:
                report = done()
                console.print(f"{'kept' if report.skipped else 'made'}  {report.path}", markup=False, highlight=False)
            except InputError as error:
                failed.append(f"{name}: {error}")
    if failed:
        raise InputError("; ".join(failed))


def _row(concept: str, method: str, reports: list[steps.Report]) -> list[str]:
    metrics = {name: value for report in reports for name, value in report.metrics.items()}
    made = [report for report in reports if not report.skipped]
    state = f"made in {sum(report.seconds for report in made):.0f} s" if made else "was there"
    loss = "-"
    if metrics.get("parameters") and "fell_by_at_least" in metrics:
        low, high = metrics["fell_by_at_least"], metrics["fell_by_at_most"]
        loss = f"{metrics['fixed_batch_loss_before']:.4f} - {metrics['fixed_batch_loss_fell_by']:.4f}"
        loss += f" [{low:.4f}, {high:.4f}]"
    images = [short(path) for report in reports for path in report.images.values()]
    return [concept, method, state, loss, "\n".join(images)]


def _show_comparison(store: Store, report: steps.Report) -> None:
    from personalize_core.report import comparison

    heading, *rows = comparison.table(report.path, store.costs())
    table = new_table(*heading)
    for row in rows:
        table.add_row(*row)
    console.print(f"Means over all concepts, with {comparison.intervals_are_over(report.path)}")
    console.print(table)
    if gaps := comparison.gaps(report.path):
        console.print(gaps)
    noise = comparison.training_noise(report.path)
    if len(noise):
        times = " or ".join(str(count) for count in sorted(set(noise["trainings"])))
        console.print(f"noise: standard deviation between {times} trainings; the verdicts count it too")
    heading, *rows = comparison.verdicts(report.path)
    if rows:
        table = new_table(*heading)
        for row in rows:
            table.add_row(*row)
        console.print('Verdicts, 95 % for all that one column "By" names together')
        console.print(table)
    show("Look at", list(report.images.items()))


def _show_report(made: steps.Report) -> None:
    show("Report", [("open in a browser", made.path), ("figures and tables", made.path.parent)])


def main() -> None:
    """The console command."""
    try:
        app()
    except (InputError, FloatingPointError) as error:
        _complain(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if not (diagnosis := diagnose(error)):
            raise
        _complain(diagnosis.sentence)
        sys.exit(1)


def _complain(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"personalize: {sentence}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
