"""The command that explains: parsing and a tree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from personalize_core import steps
from personalize_core.cli.terminal import console
from personalize_core.workspace.lineage.link import Link
from personalize_core.workspace.store import Store

app = typer.Typer()

HASH = 16  # letters of a sha256 that are shown; --json has all of them


@app.command()
def explain(
    context: typer.Context,
    path: Annotated[
        Path | None, typer.Argument(help="An image, grid, artifact, table: any file or folder of data/.")
    ] = None,
    concept: Annotated[str | None, typer.Option("--concept", "-c", help="The rows of this concept.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="The rows of this method.")] = None,
    variant: Annotated[str | None, typer.Option(help="The rows of this variant.")] = None,
    prompt: Annotated[int | None, typer.Option(min=0, help="The rows of this prompt, by its place.")] = None,
    image: Annotated[int | None, typer.Option(min=0, help="The rows of this image of a prompt.")] = None,
    metric: Annotated[str | None, typer.Option(help="The rows of this metric: clip_t, clip_i, dino ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every hash in full.")] = False,
) -> None:
    """Show what is behind a result or a number, down to the bytes, and whether it is still so.

    With options and no path, of the scores of that concept and method.
    """
    store: Store = context.obj
    link = steps.explain(store, path, steps.Rows(concept, method, variant, prompt, image, metric))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(link), indent=2, ensure_ascii=False))
        return
    console.print(_tree(link, None, {}, {}))
    problems = link.all_problems()
    for problem in problems:
        console.print(Text(f"! {problem}", "bold red"))
    if not problems:
        console.print("Every link is as it was made, and as it would be made now.")


def _tree(link: Link, into: Tree | None, shown: dict[str, Link], before: dict[str, str]) -> Tree:
    """before: how the result above came to be; what is the same here is not said again."""
    label = Text.assemble((link.what, "bold"), "  ", link.path)
    if shown.setdefault(link.path, link) is not link:
        label.append("  (as above)")
        return into.add(label) if into else Tree(label)
    making = _making(link.making)
    rows = {name: _words(value) for name, value in link.facts.items()}
    rows |= {name: words for name, words in making.items() if before.get(name) != words}
    rows |= {"again": link.again} if link.again else {}
    width = max((len(name) for name in rows), default=0)
    for name, words in rows.items():
        label.append(f"\n  {name.replace('_', ' '):<{width}}  ", "dim").append(words)
    for problem in link.problems:
        label.append(f"\n  ! {problem}", "bold red")
    tree = into.add(label) if into else Tree(label)
    for each in link.inputs:
        _tree(each, tree, shown, before | making)
    return tree


def _making(making: dict[str, Any]) -> dict[str, str]:
    found = {}
    if "finished" in making:
        found["made"] = f"{making['finished']}, in {making['seconds']} s, on {making['device'] or 'a CPU'}"
    if code := making.get("code"):
        changed = ", with changes since" if code["changed_since"] else ""
        found["code"] = f"git {code['commit'][:12]}{changed}"
    if packages := making.get("packages"):
        python = f"python {making['python']}, " if "python" in making else ""
        found["packages"] = python + ", ".join(f"{name} {version}" for name, version in packages.items())
    return found


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        if value and all(isinstance(inner, dict) for inner in value):
            return "".join(f"\n    {_words(inner)}" for inner in value)
        return "; ".join(_words(inner) for inner in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:HASH]
    return str(value)
