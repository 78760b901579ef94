"""Commands that list what can be chosen: base models and protocols."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from personalize_core.cli.terminal import print_line, print_table

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

app = typer.Typer()


@app.command("base-models")
def base_models() -> None:
    """List the base models that have a name."""
    from personalize_core.base_model.loading import PUBLISHED

    print_table(
        ("Name", "Source", "Revision", "Description"),
        [
            ("mini", "comes with this package", "-", "64 px, predicts noise; a world of sprites"),
            *((name, model.hub_id, model.revision[:12], model.note) for name, model in PUBLISHED.items()),
        ],
    )
    print_line(
        "Choose one with base_model in params.yaml. A folder in diffusers' layout, or ORGANIZATION/NAME@COMMIT on the "
        "hub, works too."
    )


@app.command()
def protocols(context: typer.Context) -> None:
    """List the protocols that --protocol knows."""
    store: Store = context.obj
    rows = []
    for name in store.protocol_names():
        protocol = replace(store, protocol=name).described_protocol
        assert protocol
        prompts = protocol.collection or ", ".join(each.name for each in protocol.prompts)
        noise = f", eta {protocol.eta:g}" if protocol.eta else ""
        sampler = f"{protocol.sampler} {protocol.steps}, guidance {protocol.guidance:g}{noise}"
        used = protocol.encoders or store.params.encoders
        encoders = ", ".join(filter(None, [*used.text_image, *used.identity, used.segmenter]))
        concepts = "those of its lists" if protocol.collection else len(protocol.concepts) or "all of the workspace"
        images = str(protocol.images_per_prompt)
        rows.append((name, protocol.title, str(concepts), prompts, images, sampler, encoders, protocol.source))
    print_table(("Name", "Protocol", "Concepts", "Prompts", "Images each", "Sampler", "Encoders", "Source"), rows)
    print_line("Each file of data/protocols also says what is uncertain about its protocol.")
