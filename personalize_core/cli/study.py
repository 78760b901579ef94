"""The study's two commands: parsing and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalize_core.cli.terminal import console, new_table, progress, show
from personalize_core.errors import listed
from personalize_core.files.atomic import MANIFEST
from personalize_core.steps import Event

app = typer.Typer()


@app.command()
def study(
    context: typer.Context,
    variants: Annotated[
        list[str], typer.Argument(help="Sampling variants with drawn grids; the first is compared with each other one.")
    ],
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            help="text: which fits the prompt; image: which looks like the concept; both: one forced choice on the "
            "two. May be repeated; text and image if none is given.",
        ),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", "-c", help="May be repeated; if none is given, all that every variant has drawn."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of each comparison in the page; a rater sees some of them.")] = 40,
    per_rater: Annotated[int, typer.Option(help="The most questions that one rater answers.")] = 40,
    concept_images: Annotated[int, typer.Option(help="concept images beside the images, at most.")] = 3,
    seed: Annotated[int, typer.Option(help="Chooses prompts, images and concept images.")] = 0,
    title: Annotated[str, typer.Option(help="What raters read on top.")] = "Which image is better?",
) -> None:
    """Build a page that asks people which of two images they prefer. It works offline, wherever it is sent."""
    from personalize_core.files.typed_yaml import build
    from personalize_core.study.design import Request
    from personalize_core.study.page import write

    wishes = {"variants": variants, "questions": question, "concepts": concept, "pairs": pairs, "per_rater": per_rater}
    wishes |= {"concept_images": concept_images, "seed": seed, "title": title}
    request = build(Request, {name: value for name, value in wishes.items() if value is not None}, "personalize study")
    with progress() as listener:
        written = write(context.obj, request, to, lambda done, total: listener(Event("writing the page", done, total)))
    key = written.key
    console.print(
        f"Study {key.study}: every rater answers {key.questions_per_rater} questions, {key.each} of each comparison "
        f"and question, over {len(key.cells)} pairs of each comparison. The page has {written.megabytes:.1f} MB"
        + (", much for a telephone; fewer --pairs make it smaller." if written.megabytes > 50 else "."),
        highlight=False,
    )
    if key.left_out:
        console.print(f"Left out, for not every variant has drawn them: {listed(key.left_out)}", highlight=False)
    show("Files", [("the page, for raters", written.page), ("the key, for nobody else", written.key_file)])


@app.command("study-results")
def study_results(
    answers: Annotated[
        list[Path], typer.Argument(help="The files that raters' pages saved, or a folder of nothing but these.")
    ],
    key: Annotated[
        Path | None, typer.Option(help="The study's study_key.json; if not given, the one beside the first answers.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="A folder for the results; if not given, that of the first answers.")
    ] = None,
) -> None:
    """Count the answers of a study: shares with intervals, and how far the raters agree."""
    from personalize_core.study import answers as answer_files
    from personalize_core.study import page, results
    from personalize_core.study.design import Key

    beside = answers[0] if answers[0].is_dir() else answers[0].parent
    read_key = Key.read(key or beside / page.KEY)
    table, files = answer_files.read(answer_files.among(answers, {page.KEY, results.SUMMARY, MANIFEST}), read_key)
    found = results.evaluate(read_key, table, files)
    written = results.write(found, table, to or beside)
    console.print(results.headline(found), highlight=False)
    heading, *rows = results.for_people(found)
    shown = new_table(*heading)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in results.notes(found):
        console.print(f"Note: {note}", markup=False, highlight=False)
    show("Written", [(path.name, path) for path in written])
