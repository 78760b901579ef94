"""A recipe on a concept: trained, sampled and scored by the steps that `personalize run` calls, and what it took."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import is_up_to_date, read_record, read_result, whole_folder, write_json
from personalize_core.files.stamps import Stamp, sources_hash, stamp_of
from personalize_core.steps.events import Listener
from personalize_core.steps.probe_record import ENDED, PROBES
from personalize_core.steps.sampling import sample_grid
from personalize_core.steps.scores import score
from personalize_core.steps.training import UNTIL_IT_ENDED, train
from personalize_core.workspace.recipes import prompts_of
from personalize_core.workspace.stamps.sampling import sampling_stamp
from personalize_core.workspace.stamps.scoring import scoring_stamp
from personalize_core.workspace.stamps.sources import WATCHING
from personalize_core.workspace.stamps.training import train_stamp
from personalize_core.workspace.store import SCORES, Store

if TYPE_CHECKING:
    import polars as pl

    from personalize_core.metrics.balance import Means
    from personalize_core.training.watch import Heard

SECONDS, HALF_WAY = "seconds.json", "half_way.json"
AGAIN = "personalize tune"  # makes again what it keeps
HALF = 0.5  # of a training: behind it the first probe is compared with those of other trials


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
    half_way: float | None = None  # the balance that a probe saw half way through the training; None: none was taken


def measure(
    scratch: Store, method: str, concept: str, listener: Listener, heard: Heard | None = None, keep: bool = True
) -> Measured:
    """Train, sample and score, or go on where that was cut off; what was measured is kept and read the next time.

    Args:
        scratch: a recipe's workspace; with `repeat`, for another training.
        heard: hears of each probe of the training, as `train` has it.
        keep: weights and images; else only what was measured.

    Raises:
        FloatingPointError: the training diverged.
    """
    from personalize_core.metrics import balance, tables

    folder = _folder(scratch, concept)
    stamp = cell_stamp(scratch, method, concept)
    if not is_up_to_date(folder, stamp):
        train(scratch, concept, method, listener, heard)
        for step in (sample_grid, score):
            step(scratch, concept, method, listener)
        with whole_folder(folder, stamp) as new:
            shutil.copyfile(scratch.scores(method, concept) / SCORES, new / SCORES)
            write_json(new / SECONDS, asdict(seconds_of(scratch, method, concept)))
            write_json(new / HALF_WAY, {"balance": half_way(scratch.artifact(method, concept))})
    if not keep:
        for made in (scratch.artifact(method, concept), scratch.grid(method, concept)):
            shutil.rmtree(made, ignore_errors=True)
    images = balance.per_image(tables.read(folder / SCORES))
    seconds = read_result(folder / SECONDS, AGAIN, training=float, sampling=float, scoring=float)
    seen = read_result(folder / HALF_WAY, AGAIN, balance=(float, type(None)))["balance"]
    return Measured(concept, balance.means(images), Seconds(**seconds), images, seen)


def balance_of_probe(metrics: Mapping[str, Sequence[float]]) -> float:
    """The mean balance of a probe's images of the concept."""
    return float(np.mean(metrics["balance"]))


def half_way(artifact: Path) -> float | None:
    """The balance at the first probe behind half of the training; None where there is none."""
    from personalize_core.metrics.parquet import read_parquet

    if not (artifact / PROBES).is_file():
        return None
    seen = read_parquet(artifact / PROBES)
    seen = seen.filter(seen["metric"] != "loss")
    behind = seen.filter(seen["done"] >= HALF * read_result(artifact / ENDED, AGAIN, of=int)["of"])
    if behind.is_empty():
        return None
    first = behind.filter(behind["done"] == behind["done"].min()).sort("row")
    metrics = first["metric"].unique(maintain_order=True)
    return balance_of_probe({name: first.filter(metric=name)["value"].to_list() for name in metrics})


def cell_stamp(scratch: Store, method: str, concept: str) -> Stamp:
    """Names all that one measurement depends on."""
    return stamp_of(
        {
            "training": train_stamp(scratch, concept, method),
            "sampling": sampling_stamp(scratch, method),
            "templates": prompts_of(scratch, concept).templates,
            "scoring": scoring_stamp(scratch),
            "concept": concept_files.content(scratch.concept_folder(concept)),
            "watched": watched_by(scratch),
        }
    )


def watched_by(store: Store) -> dict[str, Any]:
    """What probes depend on, which may end a trial."""
    return {"probes": store.params.probes.model_dump(), "sources": sources_hash(WATCHING)}


def seconds_of(scratch: Store, method: str, concept: str) -> Seconds:
    """What the costs record. Where a cut-off training's first part is not known, the whole last session counts."""
    costs = read_record(scratch.training_costs(method, concept))
    training = costs.get("training_seconds")
    if training is not None:
        training += costs.get("probe_seconds", 0.0)
    else:
        training = read_record(scratch.making(scratch.artifact(method, concept))).get("seconds", 0.0)
    each = read_record(scratch.sampling_costs(method, concept)).get("seconds_per_image", {})
    images = len(prompts_of(scratch, concept).templates) * scratch.params.sampling.images_per_prompt
    scoring = read_record(scratch.scoring_costs(method, concept)).get("scoring_seconds", 0.0)
    return Seconds(float(training), float(sum(each.values()) * images), float(scoring))


def seconds_until_it_ended(scratch: Store, method: str, concept: str) -> float:
    """Of the steps and probes of a training that diverged, or that looked hopeless."""
    return float(read_record(scratch.training_costs(method, concept)).get(UNTIL_IT_ENDED, 0.0))


def _folder(scratch: Store, concept: str) -> Path:
    return scratch.root / "measured" / str(scratch.training_seed) / concept
