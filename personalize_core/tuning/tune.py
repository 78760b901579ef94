"""All of a search: trials until the budget is spent, repeats of the best and of today's recipe, a report on the
concepts that were held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from personalize_core.concepts import concept_files
from personalize_core.errors import listed
from personalize_core.files.atomic import is_up_to_date
from personalize_core.files.stamps import Stamp, sources_hash, stamp_of
from personalize_core.steps.estimating import Recorded
from personalize_core.steps.events import Event, Listener, unheard
from personalize_core.steps.input_checks import check_inputs
from personalize_core.tuning.budget import Budget, minutes
from personalize_core.tuning.measuring import (
    HALF,
    NOTHING,
    Measured,
    Seconds,
    balance_of_probe,
    measure,
    seconds_until_it_ended,
    watched_by,
)
from personalize_core.tuning.request import Request
from personalize_core.tuning.scratch import scratch, without_weights
from personalize_core.tuning.search import (
    COMPLETE,
    DIVERGED,
    PRUNED,
    Journal,
    Suggestion,
    Trial,
    best_of,
    part_of,
    spent_on,
)
from personalize_core.tuning.space import Changes, of_today, space_of
from personalize_core.tuning.winner import Verdict, judge
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import prompts_of, recipe_of
from personalize_core.workspace.stamps.sampling import sampling_stamp
from personalize_core.workspace.stamps.scoring import scoring_stamp
from personalize_core.workspace.stamps.training import train_stamp
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.tuning.results import Outcome

SEARCHING = ("metrics/balance", "tuning/scratch", "tuning/search", "tuning/space")  # what the trials depend on
Say = Callable[[str], None]


def folder_of(store: Store, method: str) -> Path:
    """Where the results of a search lie."""
    return store.data / "tuning" / method


def kept_bytes(store: Store, method: str) -> int:
    """What the trials of the method's searches keep on the disk: scores, and of each search the best one's weights."""
    return sum(path.stat().st_size for path in store.work("tuning", method).rglob("*") if path.is_file())


def tune(store: Store, asked: Request, listener: Listener = unheard, say: Say = lambda sentence: None) -> Path:
    """Search the method's recipe, and write what was found into `folder_of` the method.

    A search that was cut off goes on where it was, to the same result; with a larger budget it goes on too.

    Args:
        say: hears in a sentence what a person should know while it runs.

    Raises:
        InputError: an input is wrong, the recipe has nothing to search, or the budget is too small for two trials.
        FloatingPointError: a training of today's recipe diverged, or of the best on the concepts held back.
    """
    method, folder = asked.method, folder_of(store, asked.method)
    check_inputs(store, [*asked.on, *asked.report_on], [method])
    recipe = recipe_of(store, method)
    budget = Budget(60 * asked.minutes, asked.repeats, recipe, space_of(recipe))
    stamp = _search_stamp(store, asked, budget)
    whole = _result_stamp(store, asked, stamp)
    with store.alone("tuning", method):
        if is_up_to_date(folder, whole):
            say("This search has ended; nothing was started.")
            return folder
        search = _Search(store, asked, budget, store.work("tuning", method, stamp), listener, say)
        outcome = search.run()
        from personalize_core.tuning import results

        with making(store, folder, whole) as new:
            results.write(outcome, new)
        search.give_back_disk()
    return folder


class Hopeless(Exception):
    """Half way through its training a trial looks worse than the median of those before it."""


class _Glance:
    """Hears of the probes of one training, and ends it where the trial looks hopeless half way through."""

    def __init__(self, suggested: Suggestion, earlier: Sequence[float | None]) -> None:
        """earlier: what was seen half way through the trial's trainings on the concepts before."""
        self.suggested, self.earlier, self.has_looked = suggested, earlier, False

    def __call__(self, done: float, metrics: Mapping[str, Sequence[float]]) -> None:
        if done < HALF or self.has_looked:
            return
        self.has_looked = True
        if self.suggested.looks_hopeless([*self.earlier, balance_of_probe(metrics)]):
            raise Hopeless


@dataclass
class _Search:
    """One search under way. What it knows lies on the disk; it can be made anew at any moment."""

    store: Store
    asked: Request
    budget: Budget
    root: Path
    listener: Listener
    say: Say

    def __post_init__(self) -> None:
        self.journal = Journal(self.root / "journal.jsonl", self.budget.space)
        self.today = of_today(self.budget.recipe, self.budget.space)

    def run(self) -> Outcome:
        from personalize_core.tuning.results import Outcome

        trials = self._trials()
        best = best_of(trials)
        if best.number == 0:
            return Outcome(self.store, self.asked, self.budget, trials, best)
        verdict, seconds = self._repeat(trials[0], best)
        share = len(self.asked.report_on) / len(self.asked.on)
        takes = minutes(share * (trials[0].seconds.all + best.seconds.all))
        self.say(f"Both are trained on {listed(self.asked.report_on)}, which were held back: about {takes}.")
        today, found = (self._report(trial) for trial in (trials[0], best))
        return Outcome(self.store, self.asked, self.budget, trials, best, verdict, seconds, today, found)

    def give_back_disk(self) -> None:
        """Of everything but the best trial, what was measured is kept alone."""
        trials = self.journal.trials
        for trial in trials:
            if trial.number != best_of(trials).number:
                without_weights(self._root_of(trial.number))

    def _trials(self) -> list[Trial]:
        """Those that the budget has room for: read from the journal, and then made."""
        if not self.journal.trials:
            self._announce()
        while True:
            ended = self.journal.trials
            if ended:
                self.budget.check(ended[0].seconds, "measured here")
            within = self.budget.within(ended)
            self._show(within)
            if len(within) < len(ended):
                return within
            suggestions = self.journal.suggestions(self.today, self.store.params.seed)
            suggested = next((each for each in suggestions if self.budget.has_room_for(each.changes, ended)), None)
            if suggested is None:
                return within
            self.journal.add(self._try(suggested))
            if not ended:
                first = self.journal.trials[0].seconds
                self.say(
                    f"A trial of today's recipe takes {minutes(first.all)} on {len(self.asked.on)} concepts; about "
                    f"{max(self.budget.likely_trials(first), 0)} are likely to fit."
                )
            self.give_back_disk()

    def _announce(self) -> None:
        """What a trial will cost, where earlier runs tell; and whether there is time for two."""
        method, recorded = self.asked.method, Recorded(self.store)
        training = recorded.seconds_of_training(method) * len(self.asked.on)
        if not recorded.anything:  # the first concept tells
            return
        images = self._images_of(self.asked.on)
        expected = Seconds(training, recorded.seconds_an_image(method, otherwise=0.0) * images, 0.0)
        self.budget.check(expected, "by earlier runs here")
        self.say(
            f"By earlier runs here a trial takes {minutes(expected.all)}, so about "
            f"{self.budget.likely_trials(expected)} are likely to fit into {minutes(self.budget.seconds)}."
        )

    def _expected_by(self, parts: Sequence[Measured]) -> Seconds:
        """What a trial takes on all concepts, by what it took on the first ones: a method is trained on each alike."""
        done = [part.concept for part in parts]
        trainings, images = len(self.asked.on) / len(done), self._images_of(self.asked.on) / self._images_of(done)
        taken = sum((part.seconds for part in parts), NOTHING)
        return Seconds(taken.training * trainings, taken.sampling * images, taken.scoring * images)

    def _images_of(self, concepts: Sequence[str]) -> int:
        """How many images a trial samples of these concepts."""
        templates = sum(len(prompts_of(self.store, name).templates) for name in concepts)
        return templates * self.store.params.sampling.images_per_prompt

    def _try(self, suggested: Suggestion) -> Trial:
        workspace = self._workspace(suggested.number, suggested.changes, self.asked.on)
        parts: list[Measured] = []
        for concept in self.asked.on:
            cell, glance = (self.asked.method, concept), _Glance(suggested, [part.half_way for part in parts])
            try:
                parts.append(measure(workspace, *cell, self.listener, glance))
            except FloatingPointError as error:
                if suggested.number == 0:
                    raise
                self.say(f"Trial {suggested.number} diverged: {error}")
                return self._ended(suggested, parts, DIVERGED, seconds_until_it_ended(workspace, *cell))
            except Hopeless:
                return self._ended(suggested, parts, PRUNED, seconds_until_it_ended(workspace, *cell))
            if len(parts) == len(self.asked.on):
                break
            if suggested.number == 0:
                known = listed([part.concept for part in parts])
                self.budget.check(self._expected_by(parts), f"by what {known} took")
            if suggested.is_hopeless([part.means.balance for part in parts]):
                return self._ended(suggested, parts, PRUNED)
        return self._ended(suggested, parts, COMPLETE)

    def _ended(self, suggested: Suggestion, parts: Sequence[Measured], state: str, lost: float = 0.0) -> Trial:
        interval = None
        if state == COMPLETE:
            found = _estimate(parts)
            interval = None if found.low is None or found.high is None else (found.low, found.high)
        return Trial(suggested.number, suggested.changes, [part_of(each) for each in parts], state, interval, lost)

    def _repeat(self, today: Trial, best: Trial) -> tuple[Verdict, Seconds]:
        """Both trained again with other seeds. Returns also what that took."""
        self.say(
            f"Trial {best.number} is the best. It and today's recipe are trained again, for the noise of training."
        )
        grids, taken = [], NOTHING
        for trial in (today, best):
            columns = [[part.means.balance for part in trial.parts]]
            for number in range(1, 1 + self.asked.repeats):
                workspace = self._workspace(trial.number, trial.changes, self.asked.on).again(number)
                column = []
                for concept in self.asked.on:
                    cell = self.asked.method, concept
                    try:
                        measured = measure(workspace, *cell, self.listener, keep=False)
                    except FloatingPointError:
                        if trial is today:
                            raise
                        column.append(0.0)
                        taken += Seconds(seconds_until_it_ended(workspace, *cell), 0.0, 0.0)
                        continue
                    column.append(measured.means.balance)
                    taken += measured.seconds
                columns.append(column)
            grids.append(np.array(columns).T)
        return judge(*grids), taken

    def _report(self, trial: Trial) -> list[Measured]:
        """A recipe on the concepts that were held back: from here on they are read."""
        workspace = self._workspace(trial.number, trial.changes, self.asked.report_on)
        method, keep = self.asked.method, trial.number > 0
        return [measure(workspace, method, concept, self.listener, keep=keep) for concept in self.asked.report_on]

    def _workspace(self, number: int, changes: Changes, concepts: Sequence[str]) -> Store:
        asked = self.asked
        return scratch(self.store, self._root_of(number), asked.method, asked.variant, changes, concepts)

    def _root_of(self, number: int) -> Path:
        return self.root / "trials" / f"{number:03d}"

    def _show(self, trials: Sequence[Trial]) -> None:
        """A bar over the budget, which tells the time that is left."""
        total = max(int(self.budget.seconds), 1)
        spent = min(int(spent_on(trials).all), total)
        best = {"best": best_of(trials).reached} if trials else {}
        what = f"seconds of the budget for {self.asked.method}"
        self.listener(Event(what, spent, total, {"trials": float(len(trials)), **best}))


def _estimate(parts: Sequence[Measured]):
    import polars as pl

    from personalize_core.metrics import balance

    return balance.estimate(pl.concat([part.images for part in parts]))


def _search_stamp(store: Store, asked: Request, budget: Budget) -> Stamp:
    """Names what the trials depend on: not the budget, nor the concepts that are held back."""
    from importlib.metadata import version

    return stamp_of(
        {
            **_measured_by(store, asked, asked.on),
            "watched": watched_by(store),
            "space": {name: repr(within) for name, within in budget.space.items()},
            "variant": asked.variant,
            "protocol": store.protocol,
            "sources": sources_hash(SEARCHING),
            "optuna": version("optuna"),
        }
    )


def _result_stamp(store: Store, asked: Request, search: Stamp) -> Stamp:
    """Names what the written result depends on."""
    return stamp_of(
        {
            "search": search,
            "minutes": asked.minutes,
            "repeats": asked.repeats,
            "report_on": _measured_by(store, asked, asked.report_on),
            "sources": sources_hash(("tuning", "report/figures/style")),
        }
    )


def _measured_by(store: Store, asked: Request, concepts: Sequence[str]) -> dict[str, object]:
    return {
        "concepts": list(concepts),
        "trainings": [train_stamp(store, concept, asked.method) for concept in concepts],
        "images": [concept_files.content(store.concept_folder(concept)) for concept in concepts],
        "prompts": [prompts_of(store, concept).templates for concept in concepts],
        "sampling": sampling_stamp(store, asked.method),
        "scoring": scoring_stamp(store),
    }
