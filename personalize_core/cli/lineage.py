"""The command that explains a result: how it came to be, as a tree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalize_core.cli.terminal import print_line, print_rich

if TYPE_CHECKING:
    from rich.tree import Tree

    from personalize_core.workspace.lineage.link import Link

app = typer.Typer()

HASH = 16  # digits of a sha256 that are shown; --json has all of them


@app.command()
def explain(
    context: typer.Context,
    path: Annotated[
        Path | None, typer.Argument(help="An image, image grid, artifact or table: any file or folder of data/.")
    ] = None,
    concept: Annotated[str | None, typer.Option("--concept", "-c", help="Only the scores of this concept.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Only the scores of this method.")] = None,
    variant: Annotated[str | None, typer.Option(help="Only the scores of this variant.")] = None,
    prompt: Annotated[int | None, typer.Option(min=0, help="Only the scores of this prompt, by its index.")] = None,
    image: Annotated[
        int | None, typer.Option(min=0, help="Only the scores of this image of a prompt, by its index.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Only the scores by this metric: clip_t, clip_i, dino ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every hash in full.")] = False,
) -> None:
    """Explain how a result or a score came to be.

    Shows every input down to the hashes of the concept images, and whether the result is still up to date. Options
    choose scores: of the table at PATH, or, without PATH, of that concept and method.
    """
    from rich.text import Text

    from personalize_core import steps

    link = steps.explain(context.obj, path, steps.Rows(concept, method, variant, prompt, image, metric))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(link), indent=2, ensure_ascii=False))
        return
    print_rich(_tree(link, None, {}, {}))
    problems = link.all_problems()
    for problem in problems:
        print_rich(Text(f"! {problem}", "bold red"))
    if not problems:
        print_line("All of it is unchanged and up to date.")


def _tree(link: Link, into: Tree | None, shown: dict[str, Link], before: dict[str, str]) -> Tree:
    """A link and its inputs, below `into`.

    Args:
        shown: links that the tree has already, by path; a second one refers to the first.
        before: how the result above was made; what is the same here is left out.
    """
    from rich.text import Text
    from rich.tree import Tree

    label = Text.assemble((link.what, "bold"), "  ", link.path)
    if shown.setdefault(link.path, link) is not link:
        label.append("  (as above)")
        return into.add(label) if into else Tree(label)
    making = _making(link.making)
    rows = {name: _text(value) for name, value in link.facts.items()}
    rows |= {name: words for name, words in making.items() if before.get(name) != words}
    if link.again:  # a command; for what no step makes, where it comes from
        rows["recompute" if "&&" in link.again else "origin"] = link.again
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


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        if value and all(isinstance(inner, dict) for inner in value):
            return "".join(f"\n    {_text(inner)}" for inner in value)
        return "; ".join(_text(inner) for inner in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:HASH]
    return str(value)
