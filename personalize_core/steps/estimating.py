"""How long a plan's work will take and how much disk it will fill: said before work that takes more than a day."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from personalize_core.artifacts.description import CONFIG, WEIGHTS
from personalize_core.files.atomic import read_record
from personalize_core.files.bounds import BYTES_AN_IMAGE, SECONDS_AN_IMAGE, TRAINING_STEPS_A_SECOND, size_of, time_of
from personalize_core.files.snapshot import snapshot
from personalize_core.methods import method_of
from personalize_core.steps.class_images import class_images_are_there
from personalize_core.steps.planning import SAMPLE, TRAIN, Cell
from personalize_core.workspace.recipes import (
    asked_for,
    asks_for_class_images,
    device_of,
    prompts_of,
    recipe_of,
    variants_of,
)
from personalize_core.workspace.store import Store

A_DAY = 86400.0  # seconds; longer work is announced


@dataclass(frozen=True)
class Estimate:
    """What the work of a plan costs on one device."""

    trainings: int  # of methods that learn; the base model alone does not
    images: int  # of grids, and of class nouns
    seconds: float
    bytes: float  # on disk
    measured: bool  # by what was recorded here, as far as there is any; else by rules of thumb for a graphics card

    def in_words(self, store: Store) -> str:
        """Rules of thumb are for a graphics card, and for base models as large as Stable Diffusion: of a CPU they say
        what it exceeds, and of the miniature on one nothing.
        """
        work = f"{self.trainings:,} training{'s' * (self.trainings != 1)} and {self.images:,} images"
        time = time_of(self.seconds)
        if self.measured or device_of(store) != "cpu":
            how = "earlier runs here" if self.measured else "rules of thumb for one fast graphics card"
            return f"{work}: about {time} on one device and {size_of(self.bytes)} on disk, by {how}"
        more = "" if store.params.base_model == "mini" else f", and longer than the {time} on one fast graphics card"
        return (
            f"{work}: about {size_of(self.bytes)} on disk; how long they take on a CPU is known once some are done "
            f"here{more}"
        )


@snapshot()
def estimate(store: Store, plan: Sequence[Cell]) -> Estimate:
    """What the trainings and images of a plan cost; scoring takes little beside them and is not counted."""
    recorded = Recorded(store)
    trained = [cell for cell in plan if cell.first == TRAIN]
    sampled = [cell for cell in plan if cell.first in (TRAIN, SAMPLE)]
    count, seconds, size = _class_images(store, trained), 0.0, 0.0
    seconds += count * recorded.seconds_an_image("base_model")
    for cell in trained:
        seconds += recorded.seconds_of_training(cell.method)
        size += recorded.bytes_of_artifact(cell.method)
    for cell in sampled:
        images = len(prompts_of(store, cell.concept).templates) * store.params.sampling.images_per_prompt
        images *= len(variants_of(store, cell.method))
        count, seconds = count + images, seconds + images * recorded.seconds_an_image(cell.method)
    learning = sum(recipe_of(store, cell.method).training_steps > 0 for cell in trained)
    return Estimate(learning, count, seconds, size + count * recorded.bytes_an_image(), recorded.anything)


def long_work_notice(store: Store, plan: Sequence[Cell]) -> str | None:
    """What a person should know before more than a day of work begins; None if it takes less."""
    found = estimate(store, plan)
    return f"This is long work. {found.in_words(store)}." if found.seconds > A_DAY else None


def _class_images(store: Store, trained: Iterable[Cell]) -> int:
    """How many images of class nouns have to be sampled first."""
    wanted: dict[str, int] = {}
    for cell in trained:
        noun = store.concept(cell.concept).class_noun
        if asks_for_class_images(store, cell.method) and not class_images_are_there(store, noun, cell.method):
            wanted[noun] = max(wanted.get(noun, 0), asked_for(store, cell.method))
    return sum(wanted.values())


class Recorded:
    """What earlier runs in this workspace took; rules of thumb where none is recorded."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.anything = False

    def seconds_of_training(self, method: str) -> float:
        steps = recipe_of(self.store, method).training_steps
        rates = self._of_concepts(self._seconds_a_step, method)
        return steps * (_mean(rates) if rates else 1 / TRAINING_STEPS_A_SECOND)

    def seconds_an_image(self, method: str, otherwise: float = SECONDS_AN_IMAGE) -> float:
        """otherwise: what is returned where none is recorded."""
        times = self._of_concepts(self._seconds_an_image, method)
        return _mean(times) if times else otherwise

    def bytes_of_artifact(self, method: str) -> float:
        sizes = self._of_concepts(self._bytes_of_artifact, method)
        return _mean(sizes) if sizes else 0.0

    def bytes_an_image(self) -> float:
        sampled = islice((self.store.sampled / "grids").glob("*/*/*/*.png"), 100)
        sizes = [path.stat().st_size for path in sampled]
        return _mean(sizes) if sizes else BYTES_AN_IMAGE

    def _of_concepts(self, ask: Callable[[str, str], float | None], method: str) -> list[float]:
        """What is known of each concept."""
        known = [value for concept in self.store.concept_names() if (value := ask(method, concept)) is not None]
        self.anything = self.anything or bool(known)
        return known

    def _bytes_of_artifact(self, method: str, concept: str) -> float | None:
        weights = self.store.artifact(method, concept) / WEIGHTS
        return weights.stat().st_size if weights.is_file() else None

    def _seconds_a_step(self, method: str, concept: str) -> float | None:
        seconds = read_record(self.store.training_costs(method, concept)).get("training_seconds")
        recipe = read_record(self.store.artifact(method, concept) / CONFIG).get("config", {})
        try:
            steps = type(recipe_of(self.store, method_of(method)))(**recipe).training_steps
        except (TypeError, ValueError):
            return None  # of an earlier version, with other options
        return seconds / steps if seconds and steps else None

    def _seconds_an_image(self, method: str, concept: str) -> float | None:
        found = read_record(self.store.sampling_costs(method, concept)).get("seconds_per_image")
        return _mean(list(found.values())) if found else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
