"""Commands about a concept: add its images, and suggest its class noun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalize_core.cli.options import Concept
from personalize_core.cli.terminal import print_line, print_paths, print_table, progress
from personalize_core.errors import listed

app = typer.Typer()
MOST_NAMED = 6  # files that are named in one line


@app.command()
def add(
    context: typer.Context,
    images: Annotated[Path, typer.Argument(help="A folder with images of the concept. It is not modified.")],
    class_noun: Annotated[
        str | None,
        typer.Option(
            help="What kind of thing it is: dog, mug, 'stuffed animal'. Needed unless the folder is named as kohya's "
            "trainer reads it: '10_rex dog'."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The concept's name. Default: the folder's name.")] = None,
) -> None:
    """Add a concept from a folder of images.

    The images are checked, and copied to data/concepts. If one of them cannot be used, nothing is added.
    """
    from personalize_core.concepts import concept_files
    from personalize_core.concepts.doubts import doubts
    from personalize_core.concepts.image_files import image_files

    concept = concept_files.add_concept(context.obj.concepts, images, class_noun, name)
    folder = context.obj.concept_folder(concept.name)
    print_line(
        f"Added {concept.name}, class noun {concept.class_noun}. In prompts, write {concept.placeholder} for it."
    )
    if named := concept_files.by_kohya(images):
        print_line(
            f"The {named.repeats} repeats of kohya's folder name are not used: each method trains for its steps."
        )
    if others := concept_files.left_out(images):
        print_line(f"Left out, as they are no concept images: {listed(others, MOST_NAMED)}.")
    for doubt in doubts(folder):
        print_line(f"Worth a look: {doubt}.")
    print_paths("Concept images", [(path.name, path) for path in image_files(folder)])


@app.command("suggest-class")
def suggest_class(
    context: typer.Context,
    concept: Concept,
    nouns: Annotated[
        str | None,
        typer.Option(
            help="Where the nouns come from. common: the short list that comes with the project; wordnet or "
            "wordnet:LEXICON: what the package wn has installed; or a file with one noun per line. Default: common "
            "with the miniature's encoder, otherwise wordnet."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
) -> None:
    """Suggest class nouns for a concept.

    Ranks nouns by their CLIP similarity to the concept images. To use one, write it as class_noun in the concept's
    concept.yaml.
    """
    from personalize_core import steps
    from personalize_core.metrics.parquet import read_parquet

    with progress() as listener:
        report = steps.suggest_class(context.obj, concept, nouns, listener)
    rows = [
        (str(row["rank"]), row["noun"], f"{row['score']:.3f}", "the present class noun" if row["is_class_noun"] else "")
        for row in read_parquet(report.path / "class_nouns.parquet").to_dicts()
        if row["rank"] <= top or row["is_class_noun"]
    ]
    print_table(("Rank", "Noun", "Mean cosine with the concept images", ""), rows)
    print_paths("Images", report.images.items())
