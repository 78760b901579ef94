"""What the commands print: lines, tables, paths, and progress bars with the time that is left.

Text is printed as it is. Rich would read "[a word]" in a path or a message as markup and drop it, so nothing here is
parsed as markup. Rich is imported when the first line is printed: `personalize --help` does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from personalize_core.steps import Event, Listener

PIPE_WIDTH = 500  # columns of a table that goes to a file or a pipe, where no terminal limits it


@lru_cache
def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_line(text: str) -> None:
    """Print text as it is. A terminal wraps it between words; into a file or a pipe it stays one line."""
    console().print(text, markup=False, highlight=False, soft_wrap=not console().is_terminal)


def print_rich(renderable: RenderableType) -> None:
    """Print a table, tree or text that Rich has composed."""
    console().print(renderable)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. Where the terminal is narrow, its last column is folded; no text is cut off."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), no_wrap=column != columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print_rich(table)


def print_paths(title: str, paths: Iterable[tuple[str, Path]]) -> None:
    """Print a table of names and paths."""
    print_table((title, "Path"), [(name, short(path)) for name, path in paths])


def short(path: Path) -> str:
    """The path relative to the current folder, where it is inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def progress() -> Iterator[Listener]:
    """A listener that shows one bar for each activity, with the time that is left and the latest metrics."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console()) as bar:

        def listen(event: Event) -> None:
            if event.what not in bars:
                bars[event.what] = bar.add_task(event.what, total=event.total, metrics="")
            metrics = "  ".join(f"{name} {value:.3g}" for name, value in event.metrics.items())
            bar.update(bars[event.what], completed=event.done, total=event.total, metrics=metrics)

        yield listen
