"""The chain from a result down to the bytes behind it: finding what was asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from personalize_core.errors import InputError
from personalize_core.files.outside import is_there
from personalize_core.methods import check_method, method_of
from personalize_core.steps.result_lineage import ResultLineage
from personalize_core.steps.score_lineage import Rows, explain_scores
from personalize_core.workspace import commands
from personalize_core.workspace.lineage.link import Link
from personalize_core.workspace.store import SCORES, Store, is_label


def explain(store: Store, path: Path | None = None, rows: Rows | None = None, verify: bool = True) -> Link:
    """What is behind a file or a folder of data/, or behind the numbers of a table of scores.

    Args:
        path: if not given, the rows name a concept and a method, and the last that was made of them is meant.
        rows: numbers of the table at `path`, in place of the whole table.
        verify: read every file to tell whether it is as it was made, and find out what is stale.

    Raises:
        InputError: there is nothing there, or nothing there that a step makes.
    """
    rows = rows or Rows()
    asks_for_numbers = rows.asked if path else rows.within_a_cell
    path = _existing(store, path) if path else _latest(store, rows)
    own, parts = _placed(store, path)
    chain = ResultLineage(own, verify)
    if not asks_for_numbers:
        return chain.link_of(path, parts)
    if parts[0] not in ("metrics", "comparison"):
        raise InputError(f"{path} holds no scores, so it has no rows; leave the options out, or make scores first")
    return explain_scores(chain, path / SCORES if path.is_dir() else path, rows)


def _existing(store: Store, path: Path) -> Path:
    """Where it lies, links left as they are: DVC may have put some there."""
    for place in (Path(os.path.abspath(path)), store.root / path):
        if place.exists():
            return place
    raise InputError(f"there is no {path}; name a file or folder of {store.data}, as it is shown by `personalize run`")


def _latest(store: Store, rows: Rows) -> Path:
    if rows.concept is None or rows.method is None:
        raise InputError("name a file or folder of data/, or a concept and a method with --concept and --method")
    if not is_label(rows.method) or not is_there(store.external(rows.method, rows.concept)):
        check_method(method_of(rows.method))  # also of an ablation that params.yaml had once
    store.concept(rows.concept)
    places = [place(rows.method, rows.concept) for place in (store.scores, store.grid, store.artifact)]
    for place in places:
        if place.is_dir():
            return place
    makes = commands.scores(store, rows.concept, rows.method)
    raise InputError(f"nothing has been made of {rows.concept!r} by {rows.method}; run `{makes}`")


def _placed(store: Store, path: Path) -> tuple[Store, list[str]]:
    """The workspace as it was for this path, by protocol and repeat; and the path within."""
    if not path.is_relative_to(store.data) or path == store.data:
        raise InputError(f"{path} is not in {store.data}; what steps make lies there")
    parts, own = list(path.relative_to(store.data).parts), Store(store.root)
    if parts[0] == "repeats" and len(parts) > 2 and parts[1].isdigit():
        own, parts = own.again(int(parts[1])), parts[2:]
    if parts[0] == "under" and len(parts) > 2:
        own, parts = replace(own, protocol=parts[1]), parts[2:]
    if parts[0] == "external_columns" and len(parts) > 1:  # with labels in place of methods
        parts = [{"images": "grids"}.get(parts[1], parts[1]), *parts[2:]]
    if parts[0] in ("repeats", "under"):
        raise InputError(f"{path} holds several results; name one of them")
    return own, parts
