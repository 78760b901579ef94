"""The command that runs the analyses and prints what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from personalize_core.cli.options import Concepts
from personalize_core.cli.terminal import print_paths, print_table, progress, short
from personalize_core.errors import InputError

if TYPE_CHECKING:
    from personalize_core.steps import Report
    from personalize_core.workspace.store import Store

app = typer.Typer()


@app.command()
def analyse(
    context: typer.Context,
    concepts: Concepts = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="A method, METHOD@ABLATION, or the label of images made elsewhere. May be "
            "repeated. Default: all that have image grids.",
        ),
    ] = None,
) -> None:
    """Analyse what the scores do not show.

    Copying of concept images, diversity, drift of the base model, missing concepts, and what the embedding became.
    """
    from personalize_core import steps
    from personalize_core.sampling.grid import DESCRIPTION
    from personalize_core.workspace.external_columns import registered

    store: Store = context.obj
    for name in concepts or []:
        store.concept(name)  # raises where there is none
    names = concepts or store.concept_names()
    columns = registered(store)
    labels = dict.fromkeys(label for label, _ in columns)
    asked = [(concept, method) for concept in names for method in methods or [*store.params.method_names, *labels]]
    asked = [(concept, method) for concept, method in asked if method not in labels or (method, concept) in columns]
    cells = [(c, m) for c, m in asked if methods or (store.grid(m, c) / DESCRIPTION).is_file()]
    if not cells:
        raise InputError(
            "there are no image grids to analyse yet; `personalize run` trains, samples and scores what is missing"
        )
    with progress() as listener:
        reports = [(cell, steps.analyse(store, *cell, listener)) for cell in cells]
        trained = [cell for cell, _ in reports if cell[1] not in labels]
        of_concept = {name: [method for one, method in trained if one == name] for name in names}
        of_several = [steps.analyse_together(store, name, many) for name, many in of_concept.items() if len(many) > 1]
    for (concept, method), report in reports:
        print_table((f"{concept}, {method}", "", "Metrics and images, or why there are none"), _rows(report))
    for report in of_several:
        print_paths(f"{report.path.name}, all these methods", report.images.items())


def _rows(report: Report) -> list[tuple[str, str, str]]:
    """(title of the analysis, metric or kind, value or reason)."""
    from personalize_core.files.atomic import read_json
    from personalize_core.steps import ANALYSES

    described = read_json(report.path / ANALYSES)
    rows = []
    for one in (described["analyses"][name] for name in described["order"]):
        title = one["title"]
        if reason := one.get("not_defined"):
            rows.append((title, "-", reason))
            continue
        for metric, value in one["metrics"].items():
            rows.append((title, metric, f"{value:.3f}" if isinstance(value, float) else str(value)))
        rows += [(title, name, f"- ({reason})") for name, reason in one["absent"].items()]
        rows += [(title, "image", short(report.path / image["file"])) for image in one["images"]]
    return rows
