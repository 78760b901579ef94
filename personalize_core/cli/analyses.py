"""The analyses' commands: parsing and tables."""

from __future__ import annotations

from typing import Annotated

import typer

from personalize_core import steps
from personalize_core.cli.terminal import console, new_table, progress, short, show
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.sampling.grid import DESCRIPTION
from personalize_core.workspace.store import Store

app = typer.Typer()


@app.command()
def analyse(
    context: typer.Context,
    concepts: Annotated[
        list[str] | None, typer.Argument(help="Names of concepts; all of them if none is given.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="A method, or METHOD@ABLATION; may be repeated. All that have drawn if none is given.",
        ),
    ] = None,
) -> None:
    """Look behind the scores: copying, diversity, drift, missing concepts, and what the embedding became."""
    store: Store = context.obj
    names = concepts or store.concept_names()
    asked = [(concept, method) for concept in names for method in methods or store.params.method_names]
    cells = [(c, m) for c, m in asked if methods or (store.grid(m, c) / DESCRIPTION).is_file()]
    if not cells:
        raise InputError("no grids have been drawn yet, and analyses look at them; `personalize run` samples them")
    with progress() as listener:
        reports = [(cell, steps.analyse(store, *cell, listener)) for cell in cells]
        of_concept = {name: [method for (one, method), _ in reports if one == name] for name in names}
        together = [steps.analyse_together(store, name, many) for name, many in of_concept.items() if len(many) > 1]
    for (concept, method), report in reports:
        described = read_json(report.path / steps.ANALYSES)
        found = described["analyses"]
        table = new_table(f"{concept}, {method}", "", "Numbers and images, or why there are none")
        for one in (found[name] for name in described["order"]):
            if reason := one.get("not_defined"):
                table.add_row(one["title"], "-", reason)
                continue
            for number, value in one["metrics"].items():
                table.add_row(one["title"], number, f"{value:.3f}" if isinstance(value, float) else str(value))
            for name, reason in one["absent"].items():
                table.add_row(one["title"], name, f"- ({reason})")
            for image in one["images"]:
                table.add_row(one["title"], "image", short(report.path / image["file"]))
        console.print(table)
    for report in together:
        show(f"{report.path.name}, all these methods", list(report.images.items()))


@app.command("suggest-class")
def suggest_class(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(help="The concept's name.")],
    nouns: Annotated[
        str | None,
        typer.Option(
            help="common: the few that come with this package; wordnet, or wordnet:LEXICON: what the package wn has "
            "installed; or a file with a noun a line. If not given, common with the mini world's encoder, else wordnet."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
) -> None:
    """Suggest class nouns: those that CLIP finds most like the concept images. Put your choice into concept.yaml."""
    from personalize_core.metrics.tables import read_parquet

    store: Store = context.obj
    with progress() as listener:
        report = steps.suggest_class(store, concept, nouns, listener)
    table = new_table("Rank", "Noun", "Mean cosine with the concept images", "")
    for row in read_parquet(report.path / "class_nouns.parquet").to_dicts():
        if row["rank"] <= top or row["is_class_noun"]:
            mark = "the class noun now" if row["is_class_noun"] else ""
            table.add_row(str(row["rank"]), row["noun"], f"{row['score']:.3f}", mark)
    console.print(table)
    show("Images", list(report.images.items()))
