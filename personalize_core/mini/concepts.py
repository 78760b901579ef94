"""The eight concepts that ship with the project: `python -m personalize_core.mini.concepts` writes data/concepts/.

Each is a drawn variant that no training of the miniature has seen, in two colours and with a mark.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from personalize_core.mini import world
from personalize_core.mini.names import HELD_OUT, SIZE
from personalize_core.mini.world import Design, Pose, Scene

FOLDER = Path("data/concepts")
PLACES = {  # name -> where its photographs were taken; the other places are left for new images
    "backpack1": ("meadow", "kitchen", "", "beach", "city"),
    "bear1": ("", "kitchen", "snow", "meadow", "beach"),
    "car1": ("city", "desert", "mountains", "", "meadow"),
    "cat1": ("kitchen", "", "meadow", "night", "snow"),
    "clock1": ("kitchen", "desert", "", "city", "jungle"),
    "dog1": ("beach", "meadow", "snow", "", "mountains"),
    "robot1": ("city", "", "night", "desert", "kitchen"),
    "teapot1": ("kitchen", "jungle", "", "snow", "beach"),
}
DESIGNS = {
    "backpack1": Design(HELD_OUT["backpack"], ("teal", "orange"), "halves", "star", "white"),
    "bear1": Design(HELD_OUT["bear"], ("pink", "purple"), "halves", "heart", "yellow"),
    "car1": Design(HELD_OUT["car"], ("yellow", "navy"), "halves", "bolt", "red"),
    "cat1": Design(HELD_OUT["cat"], ("white", "blue"), "stripes", "disc", "yellow"),
    "clock1": Design(HELD_OUT["clock"], ("purple", "yellow"), "halves", "cross", "red"),
    "dog1": Design(HELD_OUT["dog"], ("orange", "navy"), "sides", "heart", "white"),
    "robot1": Design(HELD_OUT["robot"], ("green", "pink"), "sides", "heart", "red"),
    "teapot1": Design(HELD_OUT["teapot"], ("blue", "white"), "diagonal", "heart", "red"),
}


def category(name: str) -> str:
    return name.rstrip("0123456789")


def scene(name: str, place: str, seed: int) -> Scene:
    """The concept at a place, as a photograph, in a pose drawn from the seed."""
    rng = np.random.default_rng([seed, *name.encode()])
    pose = Pose(
        size=rng.uniform(0.62, 0.80),
        x=SIZE / 2 + rng.uniform(-5, 5),
        y=SIZE * 0.54 + rng.uniform(-3, 4),
        angle=rng.uniform(-10, 10),
        flipped=bool(rng.random() < 0.3),
    )
    return Scene(category(name), DESIGNS[name], pose, place, "photo", int(rng.integers(2**31)))


def write(folder: Path = FOLDER) -> None:
    for name in DESIGNS:
        (folder / name / "masks").mkdir(parents=True, exist_ok=True)
        for number, place in enumerate(PLACES[name]):
            image, mask = world.draw(scene(name, place, number))
            Image.fromarray(image).save(folder / name / f"{number:02d}.png", optimize=True)
            Image.fromarray(mask).save(folder / name / "masks" / f"{number:02d}.png", optimize=True)
        (folder / name / "concept.yaml").write_text(f'placeholder: "<{name}>"\nclass_noun: {category(name)}\n')


if __name__ == "__main__":
    write()
