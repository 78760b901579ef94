"""What people see in a terminal: tables, paths, and a bar with the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from personalize_core import steps

console = Console(width=None if sys.stdout.isatty() else 500)  # into a file or a pipe, no line is broken


@contextmanager
def progress() -> Iterator[steps.Listener]:
    """A bar for whatever is going on, with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console) as bar:

        def listen(event: steps.Event) -> None:
            if event.what not in bars:
                bars[event.what] = bar.add_task(event.what, total=event.total, metrics="")
            metrics = "  ".join(f"{name} {value:.3g}" for name, value in event.metrics.items())
            bar.update(bars[event.what], completed=event.done, total=event.total, metrics=metrics)

        yield listen


def new_table(*columns: str) -> Table:
    """A table whose last column, a path, is folded where the terminal is narrow, and never cut off."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1], overflow="fold")
    return table


def show(title: str, paths: list[tuple[str, Path]]) -> None:
    table = new_table(title, "Path")
    for name, path in paths:
        table.add_row(name, short(path))
    console.print(table)


def short(path: Path) -> str:
    """Relative to where the user stands, where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
