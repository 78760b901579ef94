"""A workspace of four tiny concepts, and searches whose trials take a second for each step of training, not longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from personalize_core.concepts import concept_files
from personalize_core.metrics import balance
from personalize_core.steps.events import Listener
from personalize_core.tuning import measuring
from personalize_core.tuning import tune as tuning
from personalize_core.tuning.measuring import Measured, Seconds
from personalize_core.tuning.request import request
from personalize_core.tuning.tune import tune
from personalize_core.workspace.recipes import recipe_of
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.metrics.test_balance import scores

METHOD = "dreambooth"
ON, HELD_BACK = ["bob", "cup"], ["mug", "rex"]
TODAY = 6e-3  # today's learning rate, so high that a search finds better ones
MINUTES = 1.0  # for a few trials


def make(root: Path, probed: bool = False) -> Store:
    """probed: trainings are long enough to be looked at half way through."""
    tiny_workspace.make(root)
    for seed, (name, noun) in enumerate([("bob", "dog"), ("mug", "red mug")], start=7):
        tiny_workspace.paint_concept_images(root / "photos" / name, count=3, seed=seed)
        concept_files.add_concept(root / "data" / "concepts", root / "photos" / name, noun)
    values = tiny_workspace.params(root)
    (recipe,) = values["methods"][METHOD].values()
    recipe["lr"] = TODAY
    if probed:
        recipe["steps"], values["probes"] = 8, {"share": 0.5, "prompts": 1, "steps": 1}
    return tiny_workspace.write_params(root, values)


def by_steps(scratch: Store, method: str, concept: str) -> Seconds:
    """In place of `measuring.seconds_of`: what no two runs measure alike."""
    return Seconds(float(recipe_of(scratch, method).training_steps), 0.5, 0.5)


def pretended(
    scratch: Store, method: str, concept: str, listener: Listener, heard: object = None, keep: bool = True
) -> Measured:
    """In place of `measuring.measure`: no training. Best at a learning rate of 1e-3; each seed has noise of its own."""
    rate = recipe_of(scratch, method).lr
    noise = 0.02 * np.random.default_rng([scratch.training_seed, *concept.encode()]).normal()
    value = 0.5 - 0.1 * abs(np.log10(rate / 1e-3)) + noise
    images = balance.per_image(scores({(prompt, 0): (value, value + 0.01 * prompt) for prompt in range(2)}, concept))
    return Measured(concept, balance.means(images), by_steps(scratch, method, concept), images)


def by_identity(metrics: Mapping[str, Sequence[float]]) -> float:
    """In place of `measuring.balance_of_probe`: to random models every text is alien, so that all balances are 0."""
    return float(np.mean(metrics["identity"]))


def without_a_clock() -> None:
    """For a process of its own; a test patches it."""
    measuring.seconds_of = by_steps
    tuning.seconds_until_it_ended = lambda scratch, method, concept: 5.0
    measuring.balance_of_probe = tuning.balance_of_probe = by_identity


def search(root: Path, minutes: float = MINUTES, **options) -> Path:
    store = Store(root)
    return tune(store, request(store, METHOD, minutes, **options))


def left(root: Path) -> dict[str, bytes]:
    """What a search leaves: its results, and of its trials what was measured. The journal says when, too."""
    data = root / "data"
    paths = [*data.glob("tuning/**/*"), *data.glob(".work/tuning/*/*/trials/**/*")]
    return {path.relative_to(data).as_posix(): path.read_bytes() for path in sorted(paths) if _is_own(path)}


def _is_own(path: Path) -> bool:
    return path.is_file() and not {"costs", "latents", "class_images", "locks"} & set(path.parts)
