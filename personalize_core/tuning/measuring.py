"""A recipe on a concept: trained, sampled and scored by the steps that `personalize run` calls, and what it took."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import is_up_to_date, read_record, read_result, whole_folder, write_json
from personalize_core.files.stamps import Stamp, stamp_of
from personalize_core.steps.events import Listener
from personalize_core.steps.sampling import sample_grid
from personalize_core.steps.scores import score
from personalize_core.steps.training import train
from personalize_core.workspace.dependencies import sampling_stamp, scoring_stamp, train_stamp
from personalize_core.workspace.recipes import prompts_of
from personalize_core.workspace.store import SCORES, Store

if TYPE_CHECKING:
    import polars as pl

    from personalize_core.metrics.balance import Means

SECONDS = "seconds.json"


@dataclass(frozen=True)
class Seconds:
    """What a recipe took on one concept, or on several together: seconds of the device."""

    training: float
    sampling: float
    scoring: float

    @property
    def all(self) -> float:
        return self.training + self.sampling + self.scoring

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.training + other.training, self.sampling + other.sampling, self.scoring + other.scoring)

    def trained_longer(self, by: float) -> Seconds:
        """The same with so many times the steps."""
        return replace(self, training=self.training * by)


NOTHING = Seconds(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Measured:
    """One training of a recipe on one concept."""

    concept: str
    means: Means
    seconds: Seconds
    images: pl.DataFrame  # what `balance.per_image` returned


def measure(scratch: Store, method: str, concept: str, listener: Listener) -> Measured:
    """Train, sample and score, or go on where that was cut off; what was measured is kept and read the next time.

    scratch: a recipe's workspace; with `repeat`, for another training.

    Raises:
        FloatingPointError: the training diverged.
    """
    from personalize_core.metrics import balance, tables

    folder = _folder(scratch, concept)
    stamp = cell_stamp(scratch, method, concept)
    if not is_up_to_date(folder, stamp):
        for step in (train, sample_grid, score):
            step(scratch, concept, method, listener)
        with whole_folder(folder, stamp) as new:
            shutil.copyfile(scratch.scores(method, concept) / SCORES, new / SCORES)
            write_json(new / SECONDS, asdict(seconds_of(scratch, method, concept)))
    images = balance.per_image(tables.read(folder / SCORES))
    seconds = read_result(folder / SECONDS, training=float, sampling=float, scoring=float)
    return Measured(concept, balance.means(images), Seconds(**seconds), images)


def cell_stamp(scratch: Store, method: str, concept: str) -> Stamp:
    """Names all that one measurement depends on."""
    return stamp_of(
        {
            "training": train_stamp(scratch, concept, method),
            "sampling": sampling_stamp(scratch, method),
            "templates": prompts_of(scratch, concept).templates,
            "scoring": scoring_stamp(scratch),
            "concept": concept_files.content(scratch.concept_folder(concept)),
        }
    )


def seconds_of(scratch: Store, method: str, concept: str) -> Seconds:
    """What the costs record. Where a cut-off training's first part is not known, the whole last session counts."""
    training = read_record(scratch.training_costs(method, concept)).get("training_seconds")
    if training is None:
        training = read_record(scratch.making(scratch.artifact(method, concept))).get("seconds", 0.0)
    each = read_record(scratch.sampling_costs(method, concept)).get("seconds_per_image", {})
    images = len(prompts_of(scratch, concept).templates) * scratch.params.sampling.images_per_prompt
    scoring = read_record(scratch.scoring_costs(method, concept)).get("scoring_seconds", 0.0)
    return Seconds(float(training), float(sum(each.values()) * images), float(scoring))


def _folder(scratch: Store, concept: str) -> Path:
    return scratch.root / "measured" / str(scratch.training_seed) / concept
