"""Commands that compare what was scored, and write the report. What they print is shared with `run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from personalize_core.cli.terminal import print_line, print_paths, print_table, progress

if TYPE_CHECKING:
    from personalize_core.steps import Report
    from personalize_core.workspace.store import Store

app = typer.Typer()


@app.command()
def compare(context: typer.Context) -> None:
    """Compare everything that was scored.

    Writes a table, a ranking, image grids and plots.
    """
    from personalize_core import steps

    with progress() as listener:
        made = steps.compare(context.obj, listener)
    print_comparison(context.obj, made)


@app.command()
def report(context: typer.Context) -> None:
    """Compare, and write the report.

    The report is one page, data/report/report.html, that needs no other file.
    """
    from personalize_core import steps

    with progress() as listener:
        steps.compare(context.obj, listener)
        made = steps.report(context.obj, listener)
    print_report(made)


def print_comparison(store: Store, made: Report) -> None:
    """Print means with intervals, what is missing, and the verdicts of the ranking."""
    from personalize_core.report import comparison_in_words

    print_line(f"Means over all concepts, with {comparison_in_words.intervals_are_over(made.path)}")
    heading, *rows = comparison_in_words.table(made.path, store.costs())
    print_table(heading, rows)
    if gaps := comparison_in_words.gaps(made.path):
        print_line(gaps)
    if paired := comparison_in_words.pairing_of(made.path):
        print_line(paired)
    noise = comparison_in_words.training_noise(made.path)
    if len(noise):
        times = " or ".join(str(count) for count in sorted(set(noise["trainings"])))
        print_line(f"Noise: the standard deviation between {times} trainings. The verdicts take it into account.")
    heading, *rows = comparison_in_words.verdicts(made.path)
    if rows:
        print_line('Verdicts, with 95 % confidence for all comparisons of the same "By" at once')
        print_table(heading, rows)
    print_paths("Images", made.images.items())


def print_report(made: Report) -> None:
    """Print where the report is."""
    print_paths("Report", [("open in a browser", made.path), ("figures and tables", made.path.parent)])
