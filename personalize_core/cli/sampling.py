"""Commands that sample trained concepts in prompts of the user's own."""

from __future__ import annotations

from typing import Annotated

import typer

from personalize_core.cli.options import Concept, Images, Method
from personalize_core.cli.terminal import print_paths, print_table, progress

app = typer.Typer()


@app.command()
def sample(
    context: typer.Context,
    concept: Concept,
    prompt: Annotated[
        list[str], typer.Option(help="A prompt with the placeholder: 'a photo of <dog7>'. May be repeated.")
    ],
    method: Method,
    variant: Annotated[str | None, typer.Option(help="A sampling variant of params.yaml.")] = None,
    images: Images = 4,
) -> None:
    """Sample a trained concept in your own prompts."""
    from personalize_core import steps

    with progress() as listener:
        report = steps.sample_prompts(context.obj, concept, method, prompt, images, variant, listener)
    print_paths("Images", report.images.items())


@app.command()
def compose(
    context: typer.Context,
    concepts: Annotated[
        list[str],
        typer.Argument(help="Names of two or more concepts. NAME:METHOD for one that another method learned."),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(help="A prompt with every placeholder: 'a photo of <dog7> next to <mug>'. May be repeated."),
    ],
    method: Method = "personalized_residuals",
    images: Images = 4,
) -> None:
    """Sample several trained concepts in one image.

    What was learned about each concept acts only where its own words are attended to.
    """
    from personalize_core import steps

    with progress() as listener:
        cells = [_cell(word, method) for word in concepts]
        report = steps.sample_several_concepts(context.obj, cells, prompt, images, listener)
    print_table(
        ("Identity (DINO) of the part of", *(f"with {name}" for name, _ in cells)),
        [(part, *(f"{report.metrics[f'{part}.{name}']:.3f}" for name, _ in cells)) for part, _ in cells],
    )
    print_paths("Images", report.images.items())


@app.command()
def interpolate(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="A concept: NAME, or NAME:METHOD for one that another method learned.")],
    second: Annotated[str, typer.Argument(help="Another concept.")],
    prompt: Annotated[
        list[str], typer.Option(help="A prompt with the first placeholder: 'a photo of <dog7>'. May be repeated.")
    ],
    method: Method = "dti",
    points: Annotated[int, typer.Option(min=3, help="How many words, the two learned ones among them.")] = 7,
    images: Images = 2,
) -> None:
    """Sample words between two concepts' words.

    For methods that learn one word and nothing else. Each way starts from one noise.
    """
    from personalize_core import steps

    with progress() as listener:
        cells = _cell(first, method), _cell(second, method)
        report = steps.sample_between(context.obj, cells, prompt, points, images, listener)
    names = [name for name, _ in cells]
    shares = list(dict.fromkeys(key.rpartition(".")[0] for key in report.metrics))
    print_table(
        ("Identity (DINO) at this share of the way", *(f"with {name}" for name in names)),
        [(share, *(f"{report.metrics[f'{share}.{name}']:.3f}" for name in names)) for share in shares],
    )
    print_paths("Images", report.images.items())


@app.command("heat-maps")
def heat_maps(
    context: typer.Context,
    concept: Concept,
    prompt: Annotated[str, typer.Option(help="A prompt with the placeholder: 'a photo of <dog7> in the jungle'.")],
    method: Method,
    image: Annotated[int, typer.Option(min=0, help="Which image of the prompt. Each starts from its own noise.")] = 0,
    noun: Annotated[
        list[str] | None,
        typer.Option(help="A word that the base model reads in the concept's place, to compare with. May be repeated."),
    ] = None,
) -> None:
    """Show where each word of a prompt was attended to.

    One row of maps for every sampling variant of the method in params.yaml.
    """
    from personalize_core import steps

    with progress() as listener:
        report = steps.heat_maps(context.obj, concept, method, prompt, image, listener, noun or ())
    print_paths("Images", report.images.items())


def _cell(word: str, method: str) -> tuple[str, str]:
    """Concept and method of NAME:METHOD, or of NAME alone with the method of --method."""
    name, mark, own = word.partition(":")  # no name has a colon
    return name, own if mark else method
