"""The commands of the human study: build its page, and evaluate the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalize_core.cli.terminal import print_line, print_paths, print_table, progress
from personalize_core.errors import listed

app = typer.Typer()


@app.command()
def study(
    context: typer.Context,
    variants: Annotated[
        list[str],
        typer.Argument(help="Sampling variants that have image grids. The first is compared with each of the others."),
    ],
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            help="text: which image fits the prompt; image: which looks like the concept; both: one forced choice on "
            "both. May be repeated. Default: text and image.",
        ),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", "-c", help="May be repeated. Default: all that every variant has sampled."),
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="Image pairs of each comparison in the page. A rater sees some of them.")
    ] = 40,
    per_rater: Annotated[int, typer.Option(help="At most this many questions for each rater.")] = 40,
    concept_images: Annotated[int, typer.Option(help="At most this many concept images beside each pair.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed for the choice of prompts, images and concept images.")] = 0,
    title: Annotated[str, typer.Option(help="The heading of the page.")] = "Which image is better?",
) -> None:
    """Build a page that asks people to compare images.

    The page is one file that works offline, wherever it is sent.
    """
    from personalize_core.files.typed_yaml import build
    from personalize_core.steps import Event
    from personalize_core.study.design import Request
    from personalize_core.study.page import write

    wishes = {"variants": variants, "questions": question, "concepts": concept, "pairs": pairs, "per_rater": per_rater}
    wishes |= {"concept_images": concept_images, "seed": seed, "title": title}
    request = build(Request, {name: value for name, value in wishes.items() if value is not None}, "personalize study")
    with progress() as listener:
        written = write(context.obj, request, to, lambda done, total: listener(Event("writing the page", done, total)))
    key = written.key
    print_line(
        f"Study {key.study}: each rater answers {key.questions_per_rater} questions, {key.each} for each comparison "
        f"and question, from {len(key.cells)} pairs per comparison. The page has {written.megabytes:.1f} MB"
        + (", which is a lot for a phone. Fewer --pairs make it smaller." if written.megabytes > 50 else ".")
    )
    if key.left_out:
        print_line(f"Left out, because not every variant has sampled them: {listed(key.left_out)}")
    print_paths("Files", [("the page: send it to raters", written.page), ("the key: keep it", written.key_file)])


@app.command()
def agreement(
    context: typer.Context,
    answers: Annotated[
        list[Path], typer.Argument(help="The files that the raters saved, or a folder with nothing else in it.")
    ],
    key: Annotated[
        Path | None, typer.Option(help="The study's study_key.json. Default: the one beside the first answers.")
    ] = None,
) -> None:
    """Say how well each metric predicts the answers of a study.

    Pairwise accuracy and rank correlation of each metric and encoder, with intervals over raters and concepts, and how
    far the raters agree.
    """
    from personalize_core import steps
    from personalize_core.metrics.parquet import read_parquet
    from personalize_core.report.agreement_in_words import for_people
    from personalize_core.workspace.store import AGREEMENT

    with progress() as listener:
        report = steps.study_agreement(context.obj, answers, key, listener)
    found = read_parquet(report.path / AGREEMENT)
    heading, *rows = for_people(found)
    print_table(heading, rows)
    for note in found["note"].drop_nulls().unique(maintain_order=True):
        print_line(f"Note: {note}")
    print_paths("Written", [(path.name, path) for path in sorted(report.path.glob("agreement.*"))])


@app.command("study-results")
def study_results(
    answers: Annotated[
        list[Path], typer.Argument(help="The files that the raters saved, or a folder with nothing else in it.")
    ],
    key: Annotated[
        Path | None, typer.Option(help="The study's study_key.json. Default: the one beside the first answers.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="A folder for the results. Default: that of the first answers.")
    ] = None,
) -> None:
    """Evaluate the answers of a study.

    Shares of each variant with intervals over raters, and how far the raters agree.
    """
    from personalize_core.files.atomic import MANIFEST
    from personalize_core.files.outside import is_folder
    from personalize_core.study import answers as answer_files
    from personalize_core.study import page, results
    from personalize_core.study.design import Key

    beside = answers[0] if is_folder(answers[0]) else answers[0].parent
    read_key = Key.read(key or beside / page.KEY)
    table, files = answer_files.read(answer_files.among(answers, {page.KEY, results.SUMMARY, MANIFEST}), read_key)
    found = results.evaluate(read_key, table, files)
    written = results.write(found, table, to or beside)
    print_line(results.headline(found))
    heading, *rows = results.for_people(found)
    print_table(heading, rows)
    for note in results.notes(found):
        print_line(f"Note: {note}")
    print_paths("Written", [(path.name, path) for path in written])
