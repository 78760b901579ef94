"""Update docs/images: each method's image grid of one concept, as `personalize run` sampled it."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from personalize_core.workspace.store import Store

COLOURS = 256  # a palette makes the file an eighth as large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("concept", nargs="?", default="teapot1")
    parser.add_argument("--root", type=Path, default=Path("."))
    options = parser.parse_args()
    store, to = Store(options.root), Path(__file__).parent.parent / "docs" / "images"
    to.mkdir(exist_ok=True)
    for method in store.params.methods:
        with Image.open(store.grid(method, options.concept) / "grid.png", formats=("PNG",)) as grid:
            grid.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(to / f"{method}.png", optimize=True)
        print(to / f"{method}.png")


if __name__ == "__main__":
    main()
